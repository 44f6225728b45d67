"""From tokens to text, as it grows: whole characters only, and nothing that might turn out to be a stop text."""

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

WINDOW = 8
"""Tokens that are decoded together before the oldest are left behind."""

LONGEST = 48
"""Tokens after which a stretch is left behind though it does not end with a whole character."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decode one completion incrementally.

    A token may end inside a character (byte-level vocabularies), and its text may depend on the token before it. So each
    step decodes the last settled stretch together with what is new, and holds back a character at the end that is incomplete.

    Args:
        tokenizer: a transformers tokenizer, or None where there is no text.
        stops: texts that end the completion.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._settled = self._read = self._shown = 0
        self._held = ""
        self.text = ""
        """All text that is certain."""
        self.stopped = False
        """Whether a stop text was met."""

    def push(self, token: int) -> str:
        """Add a token and return the text that has become certain."""
        if self._tokenizer is None:
            return ""
        self._tokens.append(token)
        after = self._decode(self._settled)
        stuck = len(self._tokens) - self._settled > LONGEST  # bytes that never become characters, or tokens without any text
        new = (_whole(after) if stuck else after.rstrip(_BROKEN))[self._shown :]
        self._shown += len(new)
        if stuck:
            held = len(after) - self._shown
            self._settled = self._read = len(self._tokens) - WINDOW
            self._shown = max(0, len(self._decode(self._settled)) - held)
        elif not after.endswith(_BROKEN) and new:
            if len(self._tokens) - self._settled > WINDOW:
                self._settled = self._read
                self._shown = len(self._decode(self._settled))
            self._read = len(self._tokens)
        return self._emit(new, last=False) if new else ""

    def close(self) -> str:
        """Return what was held back, because nothing follows."""
        if self._tokenizer is None or self.stopped:
            return ""
        return self._emit(self._decode(self._settled)[self._shown :], last=True)

    def _decode(self, start: int) -> str:
        """The text of the tokens from `start` on."""
        return str(self._tokenizer.decode(self._tokens[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _emit(self, new: str, last: bool) -> str:
        if not self._stops:
            self.text += new
            return new
        pending = self._held + new
        found = min((at for stop in self._stops if (at := pending.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held, certain = True, "", pending[:found]
        else:
            keep = 0 if last else self._possible_stop(pending)
            certain, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += certain
        return certain

    def _possible_stop(self, pending: str) -> int:
        """Length of the longest end of `pending` with which some stop text begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(pending)), 0, -1):
            if any(stop.startswith(pending[-length:]) for stop in self._stops):
                return length
        return 0


def _whole(text: str) -> str:
    """A text without what may become another character: at most three broken ones at its end, for four bytes make a whole."""
    whole = text.rstrip(_BROKEN)
    return whole if len(text) - len(whole) <= 3 else text[:-3]
