"""From tokens to text, as it grows: whole characters only, and nothing that might turn out to be a stop text."""

import codecs
from collections.abc import Sequence
from itertools import islice
from typing import Any, Self

from trimtab.decode.spelling import spelling_of

__all__ = ["TextStream", "text_of"]

WINDOW = 8
"""Tokens before a token that its text may depend on."""

LONGEST = 4
"""Tokens that one character may have."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decode one completion incrementally.

    A token may end inside a character, and its text may depend on the token before it: many decoders drop the space that a
    text begins with. So bytes wait until they make a character, and a completion that goes on with its prompt's text follows
    the prompt's last tokens. Special tokens are no part of the text; stop texts are looked for with them and without.

    Args:
        tokenizer: a transformers tokenizer, or None where there is no text.
        stops: texts that end the completion.
        prompt: ids whose text the completion goes on with; empty where it is a text of its own. Bytes at the prompt's end that
            are no whole character are the completion's to finish.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._spelling = None if tokenizer is None else spelling_of(tokenizer)
        self._stops = tuple(stops)
        self._before: list[int] = []
        """The last tokens with text."""
        self._open: list[int] = []
        """Tokens that may be a part of a character, in a vocabulary whose bytes cannot be known."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        """Text that may become a stop text."""
        self._seen: list[bool] = []
        """Which characters of it are no special token's."""
        self.text = ""
        """All text that is certain."""
        self.stopped = False
        """Whether a stop text was met."""
        if self._spelling is not None:
            plain = (token for token in reversed(prompt) if not self._spelling.is_special(token))
            for token in reversed(list(islice(plain, WINDOW))):
                self._characters(token)

    def fork(self) -> Self:
        """Another stream that stands where this one does and goes its own way."""
        if self._spelling is None:
            return self
        other = object.__new__(type(self))
        vars(other).update(vars(self))  # copy.copy takes five times as long
        other._open, other._seen = list(self._open), list(self._seen)
        other._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        other._decoder.setstate(self._decoder.getstate())
        return other

    def push(self, token: int, *, ends: bool = False) -> str:
        """Add a token and return the text that has become certain; a token that `ends` the completion has no text."""
        if self._spelling is None:
            return ""
        if not ends and not self._spelling.is_special(token):
            return self._emit(self._characters(token))
        if not self._stops:
            return ""
        unseen, rest = self._spelling.written(self._before, token), ""
        if any(stop in unseen for stop in self._stops):  # nothing follows, so what is before it will not become whole
            rest = self._emit(self._rest())
        return rest if self.stopped else rest + self._emit(unseen, seen=False)

    @property
    def is_whole(self) -> bool:
        """Whether no character is waiting for more of its bytes."""
        return not self._open and not self._decoder.getstate()[0]

    @property
    def may_stop(self) -> bool:
        """Whether the end of the text may become a stop text."""
        return bool(self._held)

    def close(self) -> str:
        """Return what was held back, because nothing follows."""
        if self._spelling is None or self.stopped:
            return ""
        return self._emit(self._rest(), last=True)

    def _characters(self, token: int) -> str:
        """The characters that a token with text completes."""
        assert self._spelling is not None
        self._open.append(token)
        raw = self._spelling.bytes_of(token)
        if raw is None or (raw.isascii() and not self._before):  # a decoder may drop a space at the beginning
            text = self._spelling.after(self._before, self._open)
            if self._spelling.opaque and text.endswith(_BROKEN) and len(self._open) < LONGEST:
                return ""
            raw = text.encode(errors="replace")
        self._before = [*self._before, *self._open][-WINDOW:]
        self._open = []
        return self._decoder.decode(raw)

    def _rest(self) -> str:
        """The characters that are not whole, as broken ones."""
        assert self._spelling is not None
        text = self._spelling.after(self._before, self._open) if self._open else ""
        return self._decoder.decode(text.encode(errors="replace"), final=True)

    def _emit(self, new: str, *, seen: bool = True, last: bool = False) -> str:
        """Take new text, of a special token if it is not `seen`; return what has become certain."""
        if not self._stops:
            self.text += new
            return new
        self._held += new
        self._seen += [seen] * len(new)
        views = self._views()
        found = [places[at] for text, places in views for stop in self._stops if (at := text.find(stop)) >= 0]
        kept = [] if last else [places[-length] for text, places in views if (length := self._possible_stop(text))]
        self.stopped = bool(found)
        cut = min(found or kept or [len(self._held)])
        certain = "".join(char for char, shown in zip(self._held[:cut], self._seen, strict=False) if shown)
        self._held, self._seen = self._held[cut:], self._seen[cut:]
        self.text += certain
        return certain

    def _views(self) -> list[tuple[str, Sequence[int]]]:
        """What is held as stop texts may see it, with special tokens and without them, and where each character is."""
        views: list[tuple[str, Sequence[int]]] = [(self._held, range(len(self._held)))]
        if not all(self._seen):
            places = [i for i, seen in enumerate(self._seen) if seen]
            views.append(("".join(self._held[i] for i in places), places))
        return views

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of a text with which some stop text begins."""
        longest = max(len(stop) - 1 for stop in self._stops)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def text_of(tokenizer: Any, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
    """The text of a completion that is there as a whole, as a `TextStream` gives it piece by piece."""
    stream = TextStream(tokenizer, prompt=prompt)
    for token in tokens:
        stream.push(token)
    stream.close()
    return stream.text
