"""`aligner`: the first aligner drafts, and so is run one time more than for the rule alone."""

from dataclasses import dataclass
from typing import ClassVar

from trimtab.decode.drafters.base import Drafted, Drafter, Step
from trimtab.decode.drafters.rows import draft_from_rows
from trimtab.decode.shaping import Shaping

__all__ = ["AlignerDrafter"]


@dataclass(frozen=True)
class AlignerDrafter(Drafter):
    """The first of whatever aligners there are; there must be one."""

    name: ClassVar[str] = "aligner"
    from_aligner: ClassVar[bool] = True

    @property
    def who(self) -> str:
        """Where there are several."""
        return "the first aligner"

    def temperature(self, shaping: Shaping, wanted: float | None) -> float:
        """An aligner drafts from its row as the rule sees it, at a temperature that suits the rule."""
        own = shaping.aligners[0].temperature
        assert isinstance(own, float | int)
        return own * (wanted or shaping.rule.draft_temperature)

    def draft(self, step: Step) -> Drafted:
        """From its rows."""
        return draft_from_rows(step, 1)
