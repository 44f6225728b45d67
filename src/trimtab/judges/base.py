"""Judges and what they are given: pairs of answers to one instruction, and a preference for each.

A judge prefers the second answer by a number from 1 to 2, as AlpacaEval writes it. Three kinds exist: an endpoint is shown both
answers (`endpoint_judge`), a reward model and a reference metric score one at a time (`scoring_judge`). All of them keep what
they find in a `Journal` and look there first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.journal import Journal

__all__ = ["Judge", "Judgement", "Pair"]


@dataclass(frozen=True)
class Pair:
    """Two answers to compare.

    Attributes:
        prompt: what was asked: a text or messages.
        instruction: the same as a text to show.
        output_1, output_2: the baseline's answer and the system's.
        reference: a wanted answer, if there is one.
    """

    prompt: Any
    instruction: str
    output_1: str
    output_2: str
    reference: str | None = None


@dataclass(frozen=True)
class Judgement:
    """A judge's opinion of a pair.

    Attributes:
        preference: 1 to 2, 2 where the second is better; None if there is none.
        orders: what an endpoint said with the first answer shown first, and with the second shown first, both from 1 to 2 as
            above; None for judges that do not see both, or were asked once.
        scores: the scores of the two answers, from judges that score.
        why_missing: why there is no preference.
    """

    preference: float | None
    orders: tuple[float, float] | None = None
    scores: tuple[float, float] | None = None
    why_missing: str = ""


class Judge(Protocol):
    """Compares pairs."""

    kind: str
    """`"endpoint"`, `"reward"` or `"reference"`."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def judge(self, pairs: Sequence[Pair], journal: Journal) -> list[Judgement]:
        """An opinion of each pair, asking only for what the journal does not have."""

    def describe(self) -> Mapping[str, Any]:
        """What it is, for the record."""

    def cost(self) -> Mapping[str, Any] | None:
        """What it has cost, earlier parts of the run included; None if it is free."""
