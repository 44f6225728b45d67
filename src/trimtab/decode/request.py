"""What a user asks for and what comes back: `SamplingParams` in, `Completion` and `TokenEvent` out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trimtab.core.rules import Rule, parse_rule
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.knobs import KNOBS, DrawingKnobs, EndingKnobs, ShapingKnobs
from trimtab.options import same

__all__ = [
    "Completion",
    "Particles",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprobs",
    "check_against",
    "check_params",
    "refuse_row_settings",
    "with_params",
]

P = TypeVar("P")


_LATER = ("handover", "blend", "rule_weight")
"""Fields that the first version did not have."""


@dataclass(frozen=True, repr=False)
class SamplingParams(ShapingKnobs, EndingKnobs, DrawingKnobs):
    """How to decode one request.

    The first group acts on the aligned row, as it would on the row of any single model. The second group replaces, for
    this request, the model's own settings of how the row comes about; None keeps them. `trimtab.knobs` says which there are.

    Attributes:
        max_tokens: the most tokens to generate, end of sequence included.
        n: completions of the same prompt.
        temperature: 0 is greedy; otherwise aligned log-probabilities are divided by it.
        top_p: keep the most probable tokens up to this mass, 0 < p ≤ 1; see `trimtab.core.logprobs` for ties.
        top_k: keep the k most probable tokens; 0 or −1 keeps all.
        min_p: keep tokens at least this fraction as probable as the best one.
        repetition_penalty: multiplies the log-probability of every token of the prompt and of the text so far: above 1
            makes them rarer. (Models apart from ours apply it to logits, whose sign depends on the model; an aligned row
            has no logits, and its log-probabilities are never above 0.)
        logit_bias: added to the log-probability of token ids.
        stop: texts that end the completion; they are cut from `text`. They may start and end anywhere inside a token, and they
            may be or contain special tokens, which `text` leaves out.
        stop_token_ids: further ids that end it, as an end of sequence does.
        ignore_eos: go on after an end of sequence.
        seed: any integer; the same seed gives the same tokens whatever else is in the batch. None draws a fresh one. Prompts
            with one seed share their random numbers: answers that are to be independent need a seed each. In half precision,
            where arithmetic depends on the shape of a batch, the same law is promised, not the same tokens.
        logprobs: also return the log-probability of each token under proposal, aligner and aligned model.
        top_logprobs: with them, the so many best tokens at each position under the proposal and under the aligned model.
        rule: a decoding rule, by name or as an object: `"product"`, `"candidates(n=8)"`, `Geometric()`.
        handover: instead of `rule`, one that hands over: `"confidence(window=6, threshold=0.8)"` lets the aligner write until
            the proposal finds its tokens likely, and the proposal from then on; `before` and `after` in its brackets name other
            rules.
        weight: λ of the aligner, or one for each aligner.
        blend: what the weights of several aligners mix: `"logits"`, by the rule, or `"weights"`, the adapters themselves: LoRA
            aligners of one base become one aligner, with `weight` as λ of each, in one pass.
        rule_weight: λ of that one aligner.
        proposal_temperature, proposal_top_k, proposal_top_p: shape the proposal's row before the rule sees it.
        aligner_temperature: shapes each aligner's row before the rule sees it.
    """

    rule: str | Rule | None = same(ShapingKnobs, "rule")  # noqa: RUF009 - a field
    handover: str | Rule | None = same(ShapingKnobs, "handover")  # noqa: RUF009 - a field

    @property
    def asked_rule(self) -> Rule | None:
        """The rule that is said, be it as one or as a hand-over."""
        said = self.rule if self.handover is None else self.handover
        return None if said is None else parse_rule(said)

    def __repr__(self) -> str:
        """The fields; later ones where they say something: resumed files compare it, those of earlier versions too."""
        shown = (name for name in KNOBS if name not in _LATER or getattr(self, name) != KNOBS[name].default)
        return f"SamplingParams({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __post_init__(self) -> None:
        """Check every field that can be checked without a model."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, knob in KNOBS.items():
            knob.check(getattr(self, name))
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=True")
        for name in ("rule", "handover"):
            given = getattr(self, name)
            if given is None:
                continue
            if not isinstance(given, (str, Rule)):
                raise InvalidRequest(f"{name} must be the name of a rule, or a rule, not {given!r}")
            try:
                object.__setattr__(self, name, parse_rule(given))
            except InvalidOption as error:
                raise InvalidRequest(str(error) if name == "rule" else f"{name}: {error}") from None
        if isinstance(self.handover, Rule) and not self.handover.hands_over:
            example = "handover='confidence(window=6, threshold=0.8)'"
            raise InvalidRequest(f"handover: rule '{self.handover}' hands nothing over; give one that does: {example}")
        if self.rule is not None and self.handover is not None:
            named = f"handover='confidence(before={self.rule})'"
            raise InvalidRequest(f"rule has no effect beside handover: leave it out, or name it there: {named}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities of each token of a completion.

    Attributes:
        proposal: under the proposal alone, as it is: no temperature, no truncation.
        aligner: under the aligner alone, as it is; with several aligners, one such list for each.
        aligned: under the decoding rule, with the warps of its inputs, before `temperature` and the knobs after it.
        top_proposal, top_aligned: the best tokens at each position under either, as (id, log-probability), best first; if
            asked for.
    """

    proposal: list[float]
    aligner: list[float] | list[list[float]]
    aligned: list[float]
    top_proposal: list[list[tuple[int, float]]] | None = None
    top_aligned: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Attributes:
        text: without special tokens, cut before the stop text that ended it. After a text or ids it goes on with the prompt's
            text, with the space that may stand between the two; the answer of a chat is a text of its own.
        tokens: generated ids, with the end-of-sequence id if it was drawn.
        finish_reason: `"stop"` (end of sequence, stop text or stop id), `"length"`, or `"error"` where it could not go on: what
            it has so far is here, and `error` says why.
        index: which of the request's `n` completions this is.
        seed: the request's seed, also when it was drawn fresh: with it, the completion can be had again.
        prompt_tokens: length of the prompt in tokens.
        logprobs: if asked for.
        fallbacks: how many tokens' rows the rule marked: under `kl_gate`, those that the gate left to the proposal. None under
            rules that mark none.
        handover_at: how many tokens were written before the hand-over, if there was one: the index of the first token after it.
        error: why it could not go on (a distribution that is NaN, or without any token), or None.
        particles: of one that was drawn at the sequence level, all that it was drawn from.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    index: int
    seed: int
    prompt_tokens: int
    logprobs: TokenLogprobs | None = None
    fallbacks: int | None = None
    handover_at: int | None = None
    error: str | None = None
    particles: "Particles | None" = None


@dataclass(frozen=True)
class Particles:
    """The weighted set of one run of sequential Monte Carlo (`trimtab.core.particles`), from which a completion was drawn.

    Σ_i weights[i] · f(completions[i]) estimates the mean of f under the sequence-level law.

    Attributes:
        completions: of all N particles; after a resampling some may be the same. One that came to a place without any token
            has the `finish_reason` `"error"`, and weighs nothing.
        weights: one for each; they sum to 1.
        log_z: log of an unbiased estimate of Z = Σ_y Π_t w_t(y_t), in nats; under `product` that is Σ_y P_M(y)·Q(y)^λ.
        effective_size: how many equal particles the weights are worth.
        effective_sizes: how many they were worth before each token, and before the particles were resampled if they were.
        resampled: the positions of the tokens before which the particles were resampled.
        origins: how many of the N particles that the run began with those that weigh something descend from.
    """

    completions: list[Completion]
    weights: list[float]
    log_z: float
    effective_size: float
    effective_sizes: list[float]
    resampled: list[int]
    origins: int

    @property
    def collapsed(self) -> bool:
        """Whether one particle once stood for all, by its weight, or all descend from one: the set is worth little then.

        What the weights are worth at the end does not tell: resampling makes them even again.
        """
        return self.least_size < 2 or self.origins < 2

    @property
    def least_size(self) -> float:
        """How many particles the weights were worth when they were most uneven."""
        return min(self.effective_size, *self.effective_sizes)


@dataclass(frozen=True)
class TokenEvent:
    """One step of one completion while it is being generated.

    Attributes:
        prompt_index, index: which prompt, and which of its completions.
        token: the id just drawn; None on the last event of a completion that could not go on.
        text: new text that is now certain. Text that might turn out to be part of a stop text, or of a character whose
            bytes are not complete, is held back; the events' texts join to the completion's.
        finish_reason: None until the last event.
        completion: the whole, on the last event.
        proposal, aligner, aligned: log-probabilities of the token, if asked for.
        top_proposal, top_aligned: the best tokens in its place, if asked for.
    """

    prompt_index: int
    index: int
    token: int | None
    text: str
    finish_reason: str | None = None
    completion: Completion | None = None
    proposal: float | None = None
    aligner: float | list[float] | None = None
    aligned: float | None = None
    top_proposal: list[tuple[int, float]] | None = None
    top_aligned: list[tuple[int, float]] | None = None


def check_params(params: Any) -> None:
    """Refuse what is no `SamplingParams`."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams, or a list of them, not {params!r}")


def with_params(items: Sequence[P], params: Any) -> list[tuple[P, SamplingParams]]:
    """Each prompt with what is asked for: the same for all, one for each of them in a list, or None for the defaults.

    Raises:
        InvalidRequest: these are no `SamplingParams`, or not as many as there are prompts.
    """
    each = list(params) if isinstance(params, (list, tuple)) else [params or SamplingParams()] * len(items)
    for one in each:
        check_params(one)
    if len(each) != len(items):
        raise InvalidRequest(f"there are {len(items)} prompts, but {len(each)} sampling parameters")
    return list(zip(items, each, strict=True))


def check_against(params: SamplingParams, vocab_size: int, *, has_tokenizer: bool) -> None:
    """Refuse what a model of this vocabulary cannot do.

    Raises:
        InvalidRequest: stop texts without a tokenizer, or a token that there is not.
    """
    if params.stop and not has_tokenizer:
        raise InvalidRequest("stop needs a tokenizer; use stop_token_ids")
    for field, named in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if outside := [token for token in named if token >= vocab_size]:
            raise InvalidRequest(f"{field}: there is no token {outside[0]}; ids end at {vocab_size - 1}")


def refuse_row_settings(params: SamplingParams, why: str) -> None:
    """Refuse the knobs that act on the aligned row where that cannot be; `why` goes on with a knob's name."""
    plain = SamplingParams()
    for name in (name for name, knob in KNOBS.items() if knob.said["acts"] == "row"):
        if getattr(params, name) != getattr(plain, name) and not (name == "top_k" and params.top_k <= 0):
            raise InvalidRequest(
                f"{name} {why}: leave it at "
                f"{getattr(plain, name)!r}, or use proposal_temperature, proposal_top_p and aligner_temperature"
            )
