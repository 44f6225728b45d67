"""Pairs of answers without a prompt of their own: both begin with it, and this finds where it ends."""

from typing import Any, TypeVar

from trimtab.data.encoding import common_length

__all__ = ["implicit_prompt"]

TURN = "\n\nAssistant:"
"""What precedes an answer in Anthropic's transcripts."""

T = TypeVar("T", str, list[Any])


def implicit_prompt(chosen: T, rejected: T) -> T:
    """The prompt that a wanted and an unwanted answer share: two texts, or two lists of messages. It may be empty.

    Of messages it is all that are alike, and no more than leaves each side one. Of texts it is the longest common beginning,
    cut after the last turn of a transcript (answers may begin with the same words); in other texts without a space at its end,
    as TRL's `extract_prompt` does.
    """
    length = common_length(chosen, rejected)
    if not isinstance(chosen, str):
        return chosen[: min(length, len(chosen) - 1, len(rejected) - 1)]
    shared = chosen[:length]
    turn = shared.rfind(TURN)
    if turn >= 0:
        return shared[: turn + len(TURN)]
    return shared[:-1] if shared.endswith(" ") else shared
