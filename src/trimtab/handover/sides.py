"""Where the proposal is that reads a draft and goes on: in this process, or behind OpenAI-compatible endpoints."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from trimtab.data.encoding import Encoder
from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.decode.text import TextStream
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.completions import RemoteModel
from trimtab.errors import DeadRow, EndpointError, InvalidRequest
from trimtab.knobs import SHAPING
from trimtab.models.vocabulary import find_eos_token_ids, vocabulary_size

__all__ = ["Begun", "Ended", "LocalProposal", "Proposal", "RemoteProposal"]

PROPOSAL_KNOBS = ("proposal_temperature", "proposal_top_k", "proposal_top_p")
"""Those that make p̃ of the proposal's row."""


class Begun(NamedTuple):
    """An answer as far as it is written."""

    prompt: list[int]
    tokens: list[int]
    params: SamplingParams
    """What is asked of the whole answer."""


class Ended(NamedTuple):
    """An answer that was gone on with."""

    tokens: list[int]
    """Of the whole answer."""
    finish_reason: str
    error: str | None = None


class Proposal(Protocol):
    """Reads drafts and goes on with them."""

    @property
    def encoder(self) -> Encoder:
        """Makes tokens of prompts and drafts."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """What ends an answer."""

    @property
    def max_length(self) -> int | None:
        """The most tokens of a prompt with its answer; None where nobody knows."""

    def check(self, prompt: Prompt, params: SamplingParams, name: str) -> None:
        """Raise the `InvalidRequest` of a request that cannot be answered."""

    def read(self, begun: Sequence[Begun]) -> list[list[float]]:
        """The log-probability under p̃ of each token of each draft.

        Raises:
            DeadRow: a row on the way is NaN or has no mass.
        """

    def go_on(self, begun: Sequence[Begun], seeds: Sequence[int]) -> list[Ended]:
        """Finish each answer, with noise from a seed for each: at least one token."""


class LocalProposal:
    """A model in this process, which goes on as its rule and aligners have it.

    Args:
        model: with a tokenizer.
    """

    def __init__(self, model: AlignedModel) -> None:
        self._model, self._bare = model, model.with_aligners([])
        self.encoder: Encoder = model.encoder
        self.eos_token_ids: Sequence[int] = model.eos_token_ids
        self.max_length: int | None = model.max_length

    def check(self, prompt: Prompt, params: SamplingParams, name: str) -> None:
        """As `AlignedModel.generate` would."""
        self._model.prepare(prompt, params, name=name)

    def read(self, begun: Sequence[Begun]) -> list[list[float]]:
        """All drafts of the same p̃ together."""
        warps = [SamplingParams(**{name: getattr(one.params, name) for name in PROPOSAL_KNOBS}) for one in begun]
        found: dict[int, list[float]] = {}
        for warp in {repr(warp): warp for warp in warps}.values():
            places = [i for i, other in enumerate(warps) if other == warp]
            prompts, drafts = [begun[i].prompt for i in places], [begun[i].tokens for i in places]
            found |= zip(places, (score.aligned for score in self._bare.score(prompts, drafts, warp)), strict=True)
        return [found[i] for i in range(len(begun))]

    def go_on(self, begun: Sequence[Begun], seeds: Sequence[int]) -> list[Ended]:
        """In one batch."""
        prompts = [[*one.prompt, *one.tokens] for one in begun]
        rest = [_rest(one, seed) for one, seed in zip(begun, seeds, strict=True)]
        done = zip(begun, self._model.generate(prompts, rest), strict=True)
        return [Ended([*one.tokens, *c.tokens], c.finish_reason, c.error) for one, c in done]


class RemoteProposal:
    """A model behind endpoints whose `/v1/completions` takes ids and echoes their log-probabilities (Trimtab, vLLM).

    Args:
        endpoints: where it is; entered.
        tokenizer: the model's own, a transformers tokenizer: chats become texts here, by its template.
        name: the model's name there; None takes the first that is listed.
        date: what a chat template that writes the date takes for today, YYYY-MM-DD; None takes the clock's.

    Raises:
        EndpointError: no endpoint answers, or nothing is listed and there is no name.
    """

    def __init__(self, endpoints: Endpoints, tokenizer: Any, name: str | None = None, date: str | None = None) -> None:
        self._remote = RemoteModel(endpoints, name)
        self.name, self.max_length = self._remote.name, self._remote.max_length
        self.eos_token_ids: Sequence[int] = find_eos_token_ids(None, tokenizer)
        self.encoder = Encoder(tokenizer, vocabulary_size(tokenizer), self.eos_token_ids, date)

    def check(self, prompt: Prompt, params: SamplingParams, name: str) -> None:
        """What can be known here; the server refuses the rest."""
        ids = self.encoder.prompt(prompt, name)
        if self.max_length is not None and len(ids) >= self.max_length:
            room = f"the server's context holds {self.max_length} with at least one new one"
            raise InvalidRequest(f"{name} has {len(ids)} tokens, but {room}: shorten it")
        for knob in SHAPING:
            if getattr(params, knob) is not None:
                raise InvalidRequest(f"{knob} is of models that run here, and the proposal is behind an endpoint: leave it out")

    def read(self, begun: Sequence[Begun]) -> list[list[float]]:
        """One request for each draft, many at once.

        A draft that fills the context is read but for its last token, for servers want room for a new one; behind it there is
        nothing to go on with anyway.
        """
        most = None if self.max_length is None else self.max_length - 1
        try:
            logps = self._remote.prompt_logprobs([[*one.prompt, *one.tokens][:most] for one in begun])
        except EndpointError as error:
            if error.code == "dead_row":
                raise DeadRow(str(error)) from None
            raise
        return [row[len(one.prompt) :] for row, one in zip(logps, begun, strict=True)]

    def go_on(self, begun: Sequence[Begun], seeds: Sequence[int]) -> list[Ended]:
        """One request for each answer, many at once; what is written has the tokens of the texts that come back."""
        ends = [self._end_of(one) for one in begun]
        asked = []
        for one, seed, end in zip(begun, seeds, ends, strict=True):
            rest = _rest(one, seed)
            # What the server cuts off may be the rest of a stop text that has begun: then it is to cut nothing.
            asked.append(([*one.prompt, *one.tokens], dataclasses.replace(rest, stop=()) if end.may_stop else rest))
        ended = []
        for one, end, (sample,) in zip(begun, ends, self._remote.complete_each(asked), strict=True):
            tokens = one.tokens
            if sample.text:  # which first ends the character that the beginning ends in
                settled = one.tokens[: end.whole]
                tokens = [*settled, *self.encoder.split([*one.prompt, *settled], sample.text)[1]]
            reason = "error" if sample.error is not None else "stop" if sample.ended else "length"
            ended.append(Ended(tokens, reason, sample.error))
        return ended

    def _end_of(self, one: Begun) -> "_End":
        stream, whole = TextStream(self.encoder.tokenizer, one.params.stop, one.prompt), 0
        for length, token in enumerate(one.tokens, 1):
            stream.push(token)
            whole = length if stream.is_whole else whole
        return _End(whole, stream.may_stop)


class _End(NamedTuple):
    """How a beginning ends."""

    whole: int
    """How many of its tokens are whole characters."""
    may_stop: bool
    """Whether its last characters may become a stop text."""


def _rest(one: Begun, seed: int) -> SamplingParams:
    """What is asked of the rest of an answer."""
    return dataclasses.replace(one.params, max_tokens=one.params.max_tokens - len(one.tokens), n=1, seed=seed)
