"""`ngram`: the text itself drafts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.draw import NO_TOKEN
from trimtab.decode.drafters.base import TextDrafter

__all__ = ["Lookup", "NgramDrafter"]


@dataclass(frozen=True)
class NgramDrafter(TextDrafter):
    """What followed the last few tokens when they last stood in the text."""

    name: ClassVar[str] = "ngram"

    @property
    def who(self) -> str:
        """In words."""
        return "the text itself, by its n-grams"

    def start(self, tokens: Sequence[int]) -> "Lookup":
        """What was said so far."""
        return Lookup(tokens)

    def accepted(self, memory: "Lookup", tokens: Sequence[int]) -> None:
        """It is said, too."""
        memory.extend(tokens)

    def guess(self, memory: "Lookup", count: int) -> Sequence[int]:
        """By the n-grams."""
        return memory.drafts(count)


class Lookup:
    """Draft a text's continuation from the text: what followed its last few tokens when they last stood there.

    The draft at a position depends on what stands before it, and on nothing else (Saxena, "Prompt lookup decoding", 2023).

    Args:
        tokens: the text so far.
        longest: tokens to look for at most; shorter runs are tried after longer ones, down to 1.
    """

    def __init__(self, tokens: Sequence[int], longest: int = 3) -> None:
        self._longest = longest
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens that are certain."""
        for token in tokens:
            self._learn(self._tokens, token, self._next)
            self._tokens.append(token)

    def drafts(self, count: int) -> list[int]:
        """The next `count` tokens, each as if those before it had been accepted; `NO_TOKEN` where nothing is found."""
        text = self._tokens[-self._longest :]
        learned: dict[tuple[int, ...], int] = {}
        found: list[int] = []
        for _ in range(count):
            runs = [tuple(text[-n:]) for n in range(min(self._longest, len(text)), 0, -1)]
            token = next((t for run in runs if (t := learned.get(run, self._next.get(run))) is not None), NO_TOKEN)
            found.append(token)
            if token == NO_TOKEN:
                return found + [NO_TOKEN] * (count - len(found))
            self._learn(text, token, learned)
            text.append(token)
        return found

    def _learn(self, text: list[int], token: int, into: dict[tuple[int, ...], int]) -> None:
        for n in range(1, min(self._longest, len(text)) + 1):
            into[tuple(text[-n:])] = token
