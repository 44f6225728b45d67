"""What can be read of an answer of `/v1/chat/completions`: its text, and its tokens with the best in their places."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["MARKS", "Said", "entries", "read_said"]

MARKS = " \t\r\n\"'`*_.,:;!?()[]{}<>“”‘’«»▁Ġ"
"""What may stand around a word; the last two are how some tokenizers write a space."""


class Said(NamedTuple):
    """An answer.

    Attributes:
        text: what was written.
        steps: of each token what the endpoint tells, if it tells log-probabilities.
    """

    text: str
    steps: list[Mapping[str, Any]]


def read_said(answer: Any) -> Said:
    """The first choice of an answer.

    Raises:
        ValueError: it is no such answer: an error with the status of a success, or anything else without a message.
    """
    if not isinstance(answer, Mapping) or not isinstance(answer.get("choices"), list):
        said = answer.get("error") if isinstance(answer, Mapping) else None
        raise ValueError(f"no choices, but {str(said)[:200]}" if said else "no choices")
    choices = [
        choice for choice in answer["choices"] if isinstance(choice, Mapping) and isinstance(choice.get("message"), Mapping)
    ]
    if not choices:
        raise ValueError("no choice with a message")
    choice = next((choice for choice in choices if choice.get("index") == 0), choices[0])
    content = choice["message"].get("content")
    logprobs = choice.get("logprobs")
    found = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    steps = [step for step in found if isinstance(step, Mapping)] if isinstance(found, list) else []
    return Said(content if isinstance(content, str) else "", steps)


def entries(listed: Any) -> Iterator[tuple[str, float]]:
    """Tokens and their log-probabilities, as far as they are such."""
    for entry in listed if isinstance(listed, list) else []:
        token, logprob = (entry.get("token"), entry.get("logprob")) if isinstance(entry, Mapping) else (None, None)
        if isinstance(token, str) and isinstance(logprob, int | float) and logprob == logprob:
            yield token, float(max(-1e4, min(logprob, 0)))
