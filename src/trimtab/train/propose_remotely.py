"""Draw completions y' from a proposal behind OpenAI-compatible endpoints, many at a time.

Texts go to `/v1/completions`, and chats to `/v1/chat/completions`, where the server applies the template. What is written does
not depend on which endpoint answers, or when, as far as the servers keep to the seed.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab.decode.prompts import is_chat
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.client import Endpoints
from trimtab.errors import DataError, EndpointError
from trimtab.train.propose import seeded, write_samples
from trimtab.train.records import Record

__all__ = ["propose_remotely"]

NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What OpenAI's own API does not have: sent where it is not neutral, and to servers with defaults of their own."""

OWN_DEFAULTS = ("vllm", "sglang")
"""Servers (`owned_by` in `/v1/models`) that take what is not sent from the model's `generation_config.json`."""


def propose_remotely(
    endpoints: Endpoints, model: str | None, records: Sequence[Record], out: str | Path, params: SamplingParams
) -> int:
    """Write `params.n` samples for each record to `out`, in the order of the records; the number of rows.

    Args:
        endpoints: where the proposal is; entered.
        model: its name there; None takes the first that is listed.
        records: what to sample for.
        out: a `.jsonl` file.
        params: how to sample; each record adds to the seed, so that all completions differ in it.

    Raises:
        EndpointError: a request is refused, or no endpoint answers; the same call goes on where this one stopped.
        InvalidOption: `out` holds part of a run with other settings.
        DataError: a prompt that cannot be sent.
    """
    for record in records:
        try:
            json.dumps(record.prompt, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{record.source}: prompt is no valid Unicode: it has a lone surrogate") from None
    name, owner = _model(endpoints, model)
    # Completion j of n has noise of its own in `trimtab serve`. vLLM gives it seed + j, which is not to be the next prompt's.
    stride = 1 if owner == "trimtab" else params.n

    def make(numbered: tuple[int, Record]) -> tuple[str, dict[str, Any]]:
        number, record = numbered
        return _request(name, record.prompt, seeded(params, number * stride), owner in OWN_DEFAULTS)

    def read(numbered: tuple[int, Record], answer: Any) -> list[str]:
        return _texts(answer, params.n, chat=is_chat(numbered[1].prompt))

    def draw(start: int) -> Generator[list[list[str]], None, None]:
        numbered: Iterator[tuple[int, Record]] = enumerate(records[start:], start)
        yield from endpoints.map(numbered, make, read)

    return write_samples(name, draw, records, out, params)


def _model(endpoints: Endpoints, name: str | None) -> tuple[str, str]:
    """The name to ask for, and what kind of server has it; '' if it does not say."""
    try:
        listed = endpoints.pick_model(*([name] if name else []))
    except EndpointError as error:
        if name is None or error.status is None:
            raise
        return name, ""  # a server that does not list its models
    return name or str(listed["id"]), str(listed.get("owned_by", ""))


def _request(model: str, prompt: Any, params: SamplingParams, explicit: bool) -> tuple[str, dict[str, Any]]:
    """Path and body."""
    body: dict[str, Any] = {"model": model}
    body |= {field: getattr(params, field) for field in ("max_tokens", "n", "temperature", "top_p", "seed")}
    if params.stop:
        body["stop"] = list(params.stop)
    given = {field: getattr(params, field) for field in NEUTRAL}
    body |= given if explicit else {field: value for field, value in given.items() if value != NEUTRAL[field]}
    if not is_chat(prompt):
        return "/v1/completions", body | {"prompt": prompt}
    messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    return "/v1/chat/completions", body | {"messages": messages}


def _texts(answer: Any, n: int, *, chat: bool) -> list[str]:
    """The texts of the n choices, in order."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    texts = [(choice["message"]["content"] or "") if chat else choice["text"] for choice in choices]
    if len(texts) != n or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{len(texts)} texts of {n}")
    for text in texts:
        text.encode()  # what cannot be written is no answer
    return texts
