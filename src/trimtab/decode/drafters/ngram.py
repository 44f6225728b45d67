"""`ngram`: the text itself drafts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trimtab.decode.drafters.base import Guess, TextDrafter
from trimtab.decode.drafters.lookup import Lookup

__all__ = ["NgramDrafter"]


@dataclass(frozen=True)
class NgramDrafter(TextDrafter):
    """What followed the last few tokens when they last stood in the text."""

    name: ClassVar[str] = "ngram"

    @property
    def who(self) -> str:
        """In words."""
        return "the text itself, by its n-grams"

    def start(self, tokens: Sequence[int]) -> Lookup:
        """What was said so far."""
        return Lookup(tokens)

    def accepted(self, memory: Lookup, tokens: Sequence[int]) -> None:
        """It is said, too."""
        memory.extend(tokens)

    def guess(self, memory: Lookup, count: int) -> Guess:
        """By the n-grams."""
        return memory.guess(count)
