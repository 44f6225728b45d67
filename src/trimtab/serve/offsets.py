"""Where in a completion's text its tokens begin, in characters: the `text_offset` of log-probabilities.

A token is the text from its offset to the next one's. A character of several tokens is the last one's, and a special token that
is not in the text takes no room.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any

from trimtab.decode.spelling import spelling_of
from trimtab.decode.text import TextStream

__all__ = ["Offsets", "echo_ids", "echo_text"]

_SPACE = re.compile(r"\s*")


class Offsets:
    """Offsets of a completion that grows.

    Args:
        tokenizer: a transformers tokenizer, or None where there is no text.
        prompt: ids that the completion goes on with.
        start: where it begins: the length of the text before it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], start: int = 0) -> None:
        self._stream, self._at = TextStream(tokenizer, prompt=prompt), start

    def add(self, tokens: Iterable[int]) -> list[int]:
        """Offsets of the next tokens."""
        found = []
        for token in tokens:
            found.append(self._at)
            self._at += len(self._stream.push(token))
        return found


def echo_ids(tokenizer: Any, ids: Sequence[int], *, last: bool) -> tuple[str, list[int]]:
    """The text of a prompt that was given as ids, and its offsets.

    Bytes at its end that are no whole character are a completion's to finish; if the prompt is the `last`, they are broken.
    """
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    ends = accumulate(map(len, pieces), initial=0)
    return "".join(pieces) + (stream.close() if last else ""), list(islice(ends, len(pieces)))


def echo_text(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """Offsets of a prompt's tokens in the text that they were made of, special tokens that are written there included.

    Where tokenizing changed the text, by lower case for one, offsets count what the tokens say, up to the text's end.
    """
    spelling, stream, at = spelling_of(tokenizer), TextStream(tokenizer), 0
    offsets = []
    for token in ids:
        offsets.append(at)
        if spelling.is_special(token):
            at = _find(text, at, spelling.piece(token) or "", otherwise=at)
        else:
            new = stream.push(token)
            at = _find(text, at, new, otherwise=min(at + len(new), len(text)))
    return offsets


def _find(text: str, at: int, new: str, *, otherwise: int) -> int:
    """Where in a text `new` ends if it is what comes next; spaces before it may be more or fewer."""
    if text.startswith(new, at):
        return at + len(new)
    space, bare = _SPACE.match(text, at), new.lstrip()
    assert space is not None
    return space.end() + len(bare) if text.startswith(bare, space.end()) else otherwise
