"""What a user asks for and what comes back: `SamplingParams` in, `Completion` and `TokenEvent` out."""

from dataclasses import dataclass
from typing import Any

from trimtab.core.rules import Rule, parse_rule
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.knobs import KNOBS, DrawingKnobs, EndingKnobs, ShapingKnobs
from trimtab.options import same

__all__ = ["Completion", "SamplingParams", "TokenEvent", "TokenLogprobs", "check_params", "refuse_row_settings"]


_LATER = ("blend", "rule_weight")
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
        weight: λ of the aligner, or one for each aligner.
        blend: what the weights of several aligners mix: `"logits"`, by the rule, or `"weights"`, the adapters themselves: LoRA
            aligners of one base become one aligner, with `weight` as λ of each, in one pass.
        rule_weight: λ of that one aligner.
        proposal_temperature, proposal_top_k, proposal_top_p: shape the proposal's row before the rule sees it.
        aligner_temperature: shapes each aligner's row before the rule sees it.
    """

    rule: str | Rule | None = same(ShapingKnobs, "rule")  # noqa: RUF009 - a field

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
        if self.rule is not None:
            if not isinstance(self.rule, (str, Rule)):
                raise InvalidRequest(f"rule must be the name of a rule, or a rule, not {self.rule!r}")
            try:
                object.__setattr__(self, "rule", parse_rule(self.rule))
            except InvalidOption as error:
                raise InvalidRequest(str(error)) from None


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
        error: why it could not go on (a distribution that is NaN, or without any token), or None.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    index: int
    seed: int
    prompt_tokens: int
    logprobs: TokenLogprobs | None = None
    fallbacks: int | None = None
    error: str | None = None


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


def refuse_row_settings(params: SamplingParams, rule: Rule) -> None:
    """Without an aligned row there is nothing for the sampling knobs to act on; say so instead of dropping them."""
    plain = SamplingParams()
    for name in (name for name, knob in KNOBS.items() if knob.said["acts"] == "row"):
        if getattr(params, name) != getattr(plain, name) and not (name == "top_k" and params.top_k <= 0):
            raise InvalidRequest(
                f"{name} acts on the aligned row, which rule '{rule}' does not have: leave it at "
                f"{getattr(plain, name)!r}, or use proposal_temperature, proposal_top_p and aligner_temperature"
            )
