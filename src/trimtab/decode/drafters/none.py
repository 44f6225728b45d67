"""`none`: nobody drafts, and decoding is token by token."""

from dataclasses import dataclass
from typing import ClassVar

from trimtab.decode.drafters.base import Drafted, Drafter, Step

__all__ = ["NoDrafter"]


@dataclass(frozen=True)
class NoDrafter(Drafter):
    """Nobody."""

    name: ClassVar[str] = "none"
    drafts: ClassVar[bool] = False
    has_rows: ClassVar[bool] = False

    @property
    def who(self) -> str:
        """Where that was asked for."""
        return "nobody: --draft none"

    def draft(self, step: Step) -> Drafted:
        """Nothing."""
        return Drafted()
