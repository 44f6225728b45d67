"""Where the proposal is that reads a draft and goes on: in this process, or behind OpenAI-compatible endpoints."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from trimtab.data.encoding import Encoder
from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.completions import RemoteModel
from trimtab.errors import InvalidRequest
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
    """What was written behind a beginning."""

    tokens: list[int]
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
        """The log-probability under p̃ of each token of each draft."""

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
        return [Ended(c.tokens, c.finish_reason, c.error) for c in self._model.generate(prompts, rest)]


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

    max_length = None

    def __init__(self, endpoints: Endpoints, tokenizer: Any, name: str | None = None, date: str | None = None) -> None:
        self._remote = RemoteModel(endpoints, name)
        self.name = self._remote.name
        self.eos_token_ids: Sequence[int] = find_eos_token_ids(None, tokenizer)
        self.encoder = Encoder(tokenizer, vocabulary_size(tokenizer), self.eos_token_ids, date)

    def check(self, prompt: Prompt, params: SamplingParams, name: str) -> None:
        """Only what can be known here; the server refuses the rest."""
        self.encoder.prompt(prompt, name)
        for knob in SHAPING:
            if getattr(params, knob) is not None:
                raise InvalidRequest(f"{knob} is of models that run here, and the proposal is behind an endpoint: leave it out")

    def read(self, begun: Sequence[Begun]) -> list[list[float]]:
        """One request for each draft, many at once."""
        logps = self._remote.prompt_logprobs([[*one.prompt, *one.tokens] for one in begun])
        return [row[len(one.prompt) :] for row, one in zip(logps, begun, strict=True)]

    def go_on(self, begun: Sequence[Begun], seeds: Sequence[int]) -> list[Ended]:
        """One request for each answer, many at once; tokens are those of the texts that come back."""
        asked = [([*one.prompt, *one.tokens], _rest(one, seed)) for one, seed in zip(begun, seeds, strict=True)]
        ended = []
        for (ids, _), (sample,) in zip(asked, self._remote.complete_each(asked), strict=True):
            tokens = self.encoder.split(ids, sample.text)[1] if sample.text else []
            reason = "error" if sample.error is not None else "stop" if sample.ended else "length"
            ended.append(Ended(tokens, reason, sample.error))
        return ended


def _rest(one: Begun, seed: int) -> SamplingParams:
    """What is asked of the rest of an answer."""
    return dataclasses.replace(one.params, max_tokens=one.params.max_tokens - len(one.tokens), n=1, seed=seed)
