"""What objectives share that contrast two answers: whether whole answers are rewarded, or their edits alone."""

from dataclasses import dataclass

from trimtab.errors import InvalidOption
from trimtab.options import option
from trimtab.train.objectives.base import Objective

__all__ = ["Contrasting"]

CONTRAST_ON = ("answers", "edits")
"""What rewards are of."""


@dataclass(frozen=True)
class Contrasting(Objective):
    """An objective with a reward of the chosen answer and one of the rejected: of all tokens, or of those that were edited.

    The edits of an answer are its tokens that a longest common subsequence of both lacks (`trimtab.data.edits`). Where one
    answer was made of the other by a few edits, these alone say why it is preferred (arXiv 2406.02756).

    Raises:
        InvalidOption: there is a margin, and no edits.
    """

    contrast_on: str = option(
        "answers",
        "what the contrast rewards: 'answers', all their tokens; or 'edits', those alone that are not common to both, for"
        " answers and their minimal edits",
        choices=CONTRAST_ON,
        later=True,
    )
    edit_margin: int = option(
        0, "for --contrast_on edits: so many neighbours on both sides of an edit count with it [default: 0]", low=0, later=True
    )

    def __post_init__(self) -> None:
        """Refuse a margin of nothing."""
        super().__post_init__()
        if self.edit_margin and not self.on_edits:
            raise InvalidOption("edit_margin: it widens edits: give --contrast_on edits, too, or leave it out")

    @property
    def on_edits(self) -> bool:
        """Whether edits alone are rewarded."""
        return self.contrast_on == "edits"

    @property
    def edits(self) -> int | None:
        """As asked for."""
        return self.edit_margin if self.on_edits else None
