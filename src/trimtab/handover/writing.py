"""`TextHandover`: weak-to-strong decoding with two tokenizers.

Song et al., "Weak-to-strong decoding" (arXiv 2506.07434). The leader writes; the proposal reads the text in tokens of its own;
from the first place where the last few of them are likely enough, it goes on. `trimtab.core.rules.confidence` is the same with
one tokenizer, token by token.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from trimtab.core.noise import fresh_seed, seed_after
from trimtab.core.rules import parse_rule
from trimtab.core.rules.confidence import Confidence
from trimtab.data.prompts import Prompt, as_list, is_chat
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import Completion, SamplingParams, with_params
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.text import TextStream
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.handover.draft import Draft
from trimtab.handover.reading import read_alive
from trimtab.handover.sides import Ended, LocalProposal, Proposal, RemoteProposal
from trimtab.knobs import KNOBS, SHAPING

__all__ = ["TextHandover", "read_handover"]

OF_TOKENS = ("logit_bias", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs")
"""Knobs that speak of the tokens of one model."""


MORE_TOKENS = 2
"""The leader may need so many times as many tokens for a text as the proposal; then it counts as too long."""


class TextHandover:
    """A leader that begins answers, and a proposal that goes on with them, each with a tokenizer of its own.

    The law is that of texts: the leader's text is tokenised by the proposal; h is the least number of tokens, `window` or more,
    of which the last `window` have a geometric mean of `threshold` or more under p̃; the answer is the text of these h tokens,
    and what the proposal writes behind them. Without such an h, the leader's text is the whole answer.

    Args:
        leader: the small model that begins, as its own settings have it: an aligned one, too.
        proposal: who goes on: an `AlignedModel`, by its rule and with its aligners; or a `RemoteProposal`.
        handover: `"confidence(window=6, threshold=0.8)"`. `before` and `after` are for one tokenizer: here the two models say
            what comes before and after.

    Raises:
        InvalidOption: the hand-over is none, or a model has no tokenizer.
    """

    def __init__(
        self, leader: AlignedModel, proposal: AlignedModel | RemoteProposal, handover: str | Confidence = "confidence"
    ) -> None:
        self.leader, self.rule = leader, read_handover(handover)
        for name, model in (("leader", leader), ("proposal", proposal)):
            if model.encoder.tokenizer is None:
                raise InvalidOption(f"the {name} has no tokenizer, and texts are handed over: give it one")
        self.proposal: Proposal = LocalProposal(proposal) if isinstance(proposal, AlignedModel) else proposal

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: texts or chats, of any lengths; or just one of them. Each model has its own template for chats.
            params: one for all prompts, or a list with one for each. What shapes a row (`rule`, `weight`, …) is the proposal's,
                behind the hand-over; `handover` replaces this object's; `max_tokens` counts the proposal's tokens.

        Returns:
            A flat list in the order of the prompts, with `n` consecutive completions for each. `tokens` are the proposal's,
            without an end of sequence where the leader came to its end; `handover_at` counts them.

        Raises:
            InvalidRequest: a prompt or parameter cannot be decoded; nothing has been computed then.
            EndpointError: the endpoint refuses, or does not answer.
        """
        asked = [(item, _seeded(p)) for item, p in with_params(as_list(prompts), params)]
        for i, (item, p) in enumerate(asked):
            self.check(item, p, f"prompts[{i}]")
        drafts = self._lead(asked)
        going = [draft for draft in drafts if draft.goes_on]
        seeds = [seed_after(_seed(draft), draft.index) for draft in going]
        ended = iter(self.proposal.go_on([draft.begun for draft in going], seeds))
        answers = [is_chat(item) for item, p in asked for _ in range(p.n)]
        return [
            self._complete(draft, next(ended) if draft.goes_on else None, answers=alone)
            for draft, alone in zip(drafts, answers, strict=True)
        ]

    def check(self, prompt: Prompt, params: SamplingParams, name: str = "prompt") -> None:
        """Raise the `InvalidRequest` that `generate` would raise for this prompt, if any."""
        for knob in OF_TOKENS:
            if getattr(params, knob) != KNOBS[knob].default:
                raise InvalidRequest(f"{knob} speaks of one model's tokens, and here are two vocabularies: leave it out")
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise InvalidRequest(f"{name} must be a text or messages: token ids are of one of the two vocabularies")
        if params.handover is not None:
            read_handover(params.handover)
        self.leader.prepare(prompt, _leading(params), name=name)
        self.proposal.check(prompt, _following(params), name)

    def _lead(self, asked: Sequence[tuple[Prompt, SamplingParams]]) -> list[Draft]:
        """What the leader writes for each completion, as far as it is needed."""
        drafts: dict[tuple[int, int], Draft] = {}
        sequences: dict[tuple[int, int], Growing] = {}
        for i, (item, params) in enumerate(asked):
            for sequence in self.leader.prepare(item, _leading(params), i):
                sequences[i, sequence.index] = sequence
                drafts[i, sequence.index] = self._draft(item, params, sequence.index)
        engine = self.leader.engine()
        for events in engine.steps(sequences.values()):
            places = [(event.prompt_index, event.index) for event in events]
            due = [at for at, event in zip(places, events, strict=True) if not drafts[at].done and drafts[at].take(event)]
            due = list(dict.fromkeys(due))
            ready = [drafts[at] for at in due if drafts[at].settle()]
            for draft, found in zip(ready, read_alive(self.proposal, [draft.begun for draft in ready]), strict=True):
                draft.look(*found)
            engine.cancel(sequences[at] for at in due if drafts[at].done)
        return list(drafts.values())

    def _draft(self, item: Prompt, params: SamplingParams, index: int) -> Draft:
        """An answer of which nothing is written yet."""
        proposal = self.proposal
        prompt = proposal.encoder.prompt(item)
        room = params.max_tokens if proposal.max_length is None else proposal.max_length - len(prompt)
        following = dataclasses.replace(_following(params), max_tokens=min(params.max_tokens, room))
        rule = self.rule if params.handover is None else read_handover(params.handover)
        return Draft(proposal.encoder, proposal.eos_token_ids, prompt, following, index, rule)

    def _complete(self, draft: Draft, ended: Ended | None, *, answers: bool) -> Completion:
        """The whole answer: the draft, and what the proposal wrote behind it."""
        leaders = ended is None and draft.handover_at is None and not draft.full  # and nobody else's
        if ended is None:
            ended = Ended(draft.tokens, draft.finish_reason or "length", draft.error)
            ended = ended if leaders else Ended(draft.tokens, "length")
        stream = TextStream(self.proposal.encoder.tokenizer, draft.params.stop, () if answers else draft.prompt)
        tokens: list[int] = []
        for token in ended.tokens:
            tokens.append(token)
            stream.push(token, ends=token in self.proposal.eos_token_ids)
            if stream.stopped:  # by a stop text that begins before the hand-over and ends behind it, too
                break
        stream.close()
        text, stopped = stream.text, stream.stopped
        if leaders and not stopped and ended.finish_reason != "error":  # as it is, however the proposal would spell it
            text, stopped = draft.text[: draft.stop_at], draft.stop_at is not None
        return Completion(
            text=text,
            tokens=tokens,
            finish_reason="stop" if stopped else ended.finish_reason,
            index=draft.index,
            seed=_seed(draft),
            prompt_tokens=len(draft.prompt),
            handover_at=draft.handover_at if draft.goes_on else None,
            error=None if stopped else ended.error,
        )


def read_handover(said: Any) -> Confidence:
    """A hand-over between two models, from how it is spelled.

    Raises:
        InvalidOption: it is none, or says what the two models say.
    """
    rule = parse_rule(said)
    example = "confidence(window=6, threshold=0.8)"
    if not isinstance(rule, Confidence):
        raise InvalidOption(f"handover: rule '{rule}' hands nothing over between two models; give '{example}'")
    if (rule.before, rule.after) != (Confidence.before, Confidence.after):
        raise InvalidOption(
            "handover: what comes before and after are two models here, the leader and the proposal: leave both out"
        )
    return rule


def _seeded(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, seed=fresh_seed()) if params.seed is None else params


def _seed(draft: Draft) -> int:
    assert draft.params.seed is not None
    return draft.params.seed


def _leading(params: SamplingParams) -> SamplingParams:
    """What is asked of the leader, whose own settings shape its row; stop texts are looked for in the answer."""
    nothing: dict[str, Any] = dict.fromkeys(SHAPING)
    return dataclasses.replace(params, max_tokens=MORE_TOKENS * params.max_tokens, stop=(), **nothing)


def _following(params: SamplingParams) -> SamplingParams:
    """What is asked of the proposal."""
    return dataclasses.replace(params, handover=None)
