"""One call of a reward function, as TRL makes it: its arguments, what it gives, and in which words it fails.

The words of a failure follow what the function is called and what it was asked of.
"""

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from trimtab.data.prompts import is_chat
from trimtab.judges.rewards.base import as_score, as_values

__all__ = ["Arguments", "Failed", "Replies", "Reply", "ask", "ask_alone", "make_arguments", "only", "read_value", "show"]

Arguments: TypeAlias = Mapping[str, Sequence[Any]]
"""Lists of one length by name: `prompts`, `completions` and columns."""


class Failed(Exception):
    """A function gives no score, for what it raises or for what else it gives; `__cause__` is what it raises."""


Reply: TypeAlias = float | Failed | None
"""What comes of one completion."""

Replies: TypeAlias = Generator[tuple[int, Reply], None, None]
"""What comes of each completion by its place, in any order."""


def make_arguments(
    prompts: Sequence[Any],
    answers: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    takes: Collection[str] | None,
) -> Arguments:
    """What a function is given.

    Args:
        prompts: texts or chats.
        answers: a text for each.
        columns: what else the data have of each, by column.
        takes: the names that it takes; None if it takes all.
    """
    given: dict[str, Sequence[Any]] = {**columns}
    given["prompts"] = [_messages(prompt) for prompt in prompts]
    given["completions"] = [
        [{"role": "assistant", "content": answer}] if is_chat(prompt) else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return given if takes is None else {name: values for name, values in given.items() if name in takes}


def only(arguments: Arguments, i: int) -> dict[str, Sequence[Any]]:
    """The arguments of one completion alone."""
    return {name: values[i : i + 1] for name, values in arguments.items()}


def ask(function: Callable[..., Any], arguments: Arguments, count: int) -> Sequence[Any]:
    """What a function gives for so many completions; which values they are, `read_value` looks at.

    Raises:
        Failed: it raises, or does not give so many values.
    """
    try:
        given = function(**arguments)
        if inspect.isawaitable(given):
            given = _awaited(given)
    except (Exception, SystemExit) as error:  # whatever somebody's function raises
        raise Failed(f"raised {type(error).__name__}: {error}{_place(function, error)}") from error
    try:
        return as_values(given, count)
    except ValueError as error:
        raise Failed(str(error)) from None


def ask_alone(function: Callable[..., Any], arguments: Arguments) -> Reply:
    """The score of one completion."""
    try:
        return read_value(ask(function, arguments, 1)[0])
    except Failed as failed:
        return failed


def read_value(value: Any) -> Reply:
    """The score that a value is."""
    try:
        return as_score(value)
    except ValueError as error:
        return Failed(f"gave {repr(value)[:80]}, but {error}")


def show(prompt: Any, answer: str, source: str | None) -> str:
    """A completion and its prompt for a message: their first characters, and where the prompt comes from."""
    place = "" if source is None else f" ({source})"
    return f"the completion {_short(answer)} of the prompt {_short(_last(prompt))}{place}"


def _short(text: Any) -> str:
    text = text if isinstance(text, str) else repr(text)
    return repr(text[:80]) + "…" * (len(text) > 80)


def _last(prompt: Any) -> Any:
    """What a chat's user said last, or the last message; another prompt is itself."""
    if not is_chat(prompt):
        return prompt
    messages = _messages(prompt)
    said = [message for message in messages if message.get("role") == "user"]
    return (said or messages)[-1].get("content") if messages else ""


def _messages(prompt: Any) -> Any:
    """A prompt as TRL has it: tools and the like are columns."""
    return prompt["messages"] if isinstance(prompt, Mapping) and "messages" in prompt else prompt


def _awaited(given: Awaitable[Any]) -> Any:
    """What comes of it, on a thread of its own: a notebook's thread has a loop that runs already."""

    async def wait() -> Any:
        return await given

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def _place(function: Callable[..., Any], error: BaseException) -> str:
    """Where in the function's file it was raised."""
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (line {lines[-1]} of {Path(str(file)).name})" if lines else ""
