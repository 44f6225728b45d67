"""Completions from OpenAI-compatible endpoints, asked for with this library's own parameters, many at a time.

Texts go to `/v1/completions`, and chats to `/v1/chat/completions`, where the server applies the template.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from trimtab.data.prompts import Prompt, is_chat, read_chat
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.client import Endpoints
from trimtab.errors import EndpointError
from trimtab.knobs import KNOBS, DrawingKnobs

__all__ = ["RemoteModel", "Sample"]

OPENAI = [name for name, knob in KNOBS.items() if knob.said.get("openai") and knob.kind is not None]
"""What OpenAI's API has: sent as it is."""
NEUTRAL = {field.name: field.default for field in dataclasses.fields(DrawingKnobs) if field.name not in OPENAI}
"""What OpenAI's own API does not have: sent where it is not neutral, and to servers with defaults of their own."""

OWN_DEFAULTS = ("vllm", "sglang")
"""Servers (`owned_by` in `/v1/models`) that take what is not sent from the model's `generation_config.json`."""


ROUNDING = 1e-3
"""By so much a server's log-probability may be above 0."""


class Sample(NamedTuple):
    """A completion's text, whether it came to its end or was cut by `max_tokens`, and why it could not go on, if so."""

    text: str
    ended: bool
    error: str | None = None


class RemoteModel:
    """A model behind endpoints.

    Args:
        endpoints: where it is; entered.
        name: its name there; None takes the first that is listed.

    Attributes:
        max_length: the most tokens of a prompt with its answer, `max_model_len` in the list; None if the server does not say.

    Raises:
        EndpointError: no endpoint answers, or nothing is listed and there is no name.
    """

    def __init__(self, endpoints: Endpoints, name: str | None = None) -> None:
        self._endpoints = endpoints
        self.name, self._owner, self.max_length = _find(endpoints, name)

    def complete(self, prompts: Sequence[Prompt], params: SamplingParams, start: int = 0) -> Iterator[list[list[Sample]]]:
        """`params.n` completions for each prompt, in the order of the prompts, as soon as they can be had.

        Args:
            prompts: texts or chats.
            params: how to sample, with a seed; each prompt adds to it, so that all completions differ in theirs.
            start: the number of the prompt to begin with.

        Raises:
            EndpointError: a request is refused, or no endpoint answers.
        """
        first = params.seed or 0
        # Completion j of n has noise of its own in `trimtab serve`. vLLM gives it seed + j, not to be the next prompt's.
        stride = 1 if self._owner == "trimtab" else params.n

        numbers = range(start, len(prompts))
        yield from self._ask((prompts[i], dataclasses.replace(params, seed=first + i * stride)) for i in numbers)

    def complete_each(self, requests: Sequence[tuple[Prompt, SamplingParams]]) -> list[list[Sample]]:
        """The completions that each request asks for, which have the seeds that stand there.

        Raises:
            EndpointError: as `complete`.
        """
        return [samples for some in self._ask(requests) for samples in some]

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token of each prompt behind those before it; NaN of the first, which has none.

        Raises:
            EndpointError: as `complete`; or the server does not echo log-probabilities of prompts.
        """
        asked = {"model": self.name, "max_tokens": 0, "temperature": 0.0, "echo": True, "logprobs": 1}

        def make(ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
            return "/v1/completions", asked | {"prompt": list(ids)}

        return [logps for some in self._endpoints.map(prompts, make, _echoed) for logps in some]

    def _ask(self, requests: Iterable[tuple[Prompt, SamplingParams]]) -> Iterator[list[list[Sample]]]:
        """The samples of each request, in order."""

        def make(request: tuple[Prompt, SamplingParams]) -> tuple[str, dict[str, Any]]:
            return self._request(*request)

        def read(request: tuple[Prompt, SamplingParams], answer: Any) -> list[Sample]:
            return _samples(answer, request[1].n, chat=is_chat(request[0]))

        def failed(request: tuple[Prompt, SamplingParams], error: EndpointError) -> list[Sample]:
            if error.code != "dead_row":  # of which the others' answers know nothing
                raise error
            return [Sample("", True, str(error))] * request[1].n

        yield from self._endpoints.map(requests, make, read, failed)

    def _request(self, prompt: Any, params: SamplingParams) -> tuple[str, dict[str, Any]]:
        """Path and body."""
        body: dict[str, Any] = {"model": self.name}
        body |= {field: getattr(params, field) for field in OPENAI}
        if params.stop:
            body["stop"] = list(params.stop)
        given = {field: getattr(params, field) for field in NEUTRAL}
        explicit = self._owner in OWN_DEFAULTS
        body |= given if explicit else {field: value for field, value in given.items() if value != NEUTRAL[field]}
        if not is_chat(prompt):
            return "/v1/completions", body | {"prompt": prompt}
        chat = read_chat(prompt, "prompt")
        body["messages"] = [{key: value for key, value in message.items() if value is not None} for message in chat.messages]
        body |= {"tools": chat.tools} if chat.tools else {}
        body |= {"chat_template_kwargs": dict(chat.settings)} if chat.settings else {}
        return "/v1/chat/completions", body


def _find(endpoints: Endpoints, name: str | None) -> tuple[str, str, int | None]:
    """The name to ask for; what kind of server has it, '' if it does not say; and how much a context holds, if it says so."""
    try:
        listed = endpoints.pick_model(*([name] if name else []))
    except EndpointError as error:
        if name is None or error.status is None:
            raise
        return name, "", None  # a server that does not list its models
    most = listed.get("max_model_len")
    return name or str(listed["id"]), str(listed.get("owned_by", "")), most if type(most) is int else None


def _samples(answer: Any, n: int, *, chat: bool) -> list[Sample]:
    """The n choices, in order."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    texts = [(choice["message"]["content"] or "") if chat else choice["text"] for choice in choices]
    if len(texts) != n or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{len(texts)} texts of {n}")
    for text in texts:
        text.encode()  # what cannot be written is no answer
    return [
        Sample(text, choice.get("finish_reason") != "length", _error(choice))
        for text, choice in zip(texts, choices, strict=True)
    ]


def _echoed(ids: Sequence[int], answer: Any) -> list[float]:
    """The log-probability of each of a prompt's tokens; a server that generates one more echoes that, too."""
    echoed = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
    told = echoed[1 : len(ids)]
    if not len(ids) <= len(echoed) <= len(ids) + 1 or not all(map(_is_logprob, told)):
        raise EndpointError("the server echoes no log-probabilities of prompts (/v1/completions, echo with logprobs)")
    return [math.nan, *map(float, told)]


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and value <= ROUNDING


def _error(choice: dict[str, Any]) -> str | None:
    """Why a choice could not go on, in the server's words if it has any."""
    if choice.get("finish_reason") != "error":
        return None
    said = choice.get("error")
    return str(said["message"]) if isinstance(said, dict) and said.get("message") else "the server ended it with an error"
