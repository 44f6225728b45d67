"""Unpaired preference: a column `label` that says of one answer whether it is wanted. Read as wanted, all would be learnt."""

from collections.abc import Sequence
from typing import Any

from trimtab.errors import DataError

__all__ = ["LABEL", "refuse_unwanted"]

LABEL = "label"

NUMBERS: dict[float, bool] = {1: True, 0: False, -1: False}
WORDS = {
    **dict.fromkeys(("true", "1", "yes", "good", "desirable", "chosen"), True),
    **dict.fromkeys(("false", "0", "-1", "no", "bad", "undesirable", "rejected"), False),
}


def refuse_unwanted(labels: Sequence[tuple[str, Any]]) -> None:
    """Refuse answers that are not wanted.

    Labels of which one is neither yes nor no name classes, and say nothing of it; but `false` says it among any others.

    Args:
        labels: of each answer that would count as wanted, where it comes from and its label; null says nothing.

    Raises:
        DataError: names the first that is not, and the cure.
    """
    verdicts = {place: _is_wanted(label) for place, label in labels if label is not None}
    classes = None in verdicts.values()
    unwanted = [place for place, label in labels if label is False or (verdicts.get(place) is False and not classes)]
    if unwanted:
        raise DataError(
            f"{unwanted[0]}: '{LABEL}' says that the answer is not wanted, as it does of {len(unwanted)} of {len(labels)}"
            f" answers: keep the records with {LABEL}=true, or pair the answers to a prompt as 'chosen' and 'rejected'; if"
            f" '{LABEL}' means something else, name the columns that count:"
            " --columns prompt=prompt --columns completion=completion"
        )


def _is_wanted(label: Any) -> bool | None:
    """None where a label is no yes and no no."""
    if isinstance(label, str):
        return WORDS.get(label.strip().lower())
    return NUMBERS.get(label) if isinstance(label, (int, float)) else None
