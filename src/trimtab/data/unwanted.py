"""Unpaired preference: a column `label` that says of one answer whether it is wanted. Read as wanted, all would be learnt.

Nothing tells such a column from one of classes but its values, so they are read in every spelling that says yes or no. What is
not refused is not read, and a warning says so.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from trimtab.errors import DataError

__all__ = ["LABEL", "refuse_unwanted"]

LABEL = "label"

logger = logging.getLogger(__name__)

NUMBERS: dict[float, bool] = {1: True, 0: False, -1: False}
_YES = {
    *("true", "t", "yes", "y", "good", "desirable", "desired", "chosen", "wanted"),
    *("preferred", "prefer", "accepted", "accept", "acceptable", "approved", "approve", "liked", "like"),
    *("up", "thumbsup", "upvote", "upvoted", "safe", "win", "won", "winner", "correct"),
    *("right", "valid", "helpful", "harmless", "pass", "passed", "positive", "pos", "+"),
    *("ok", "👍", "✓", "✔", "✅"),
}
_NO = {
    *("false", "f", "no", "n", "bad", "rejected", "reject", "down", "thumbsdown"),
    *("downvote", "downvoted", "lose", "lost", "loser", "loss", "wrong", "harmful", "toxic"),
    *("fail", "failed", "negative", "neg", "-", "👎", "✗", "✘", "❌"),
    *(f"{prefix}{word}" for prefix in ("un", "in", "dis", "non", "not") for word in _YES),
}
WORDS = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}
_NOTHING = ("", "none", "null", "nan", "na", "n/a")
_SENTIMENTS = ("positive", "pos", "negative", "neg")
"""What names classes where there are more than two."""


def refuse_unwanted(labels: Sequence[tuple[str, Any]], *, ignored: bool = False) -> None:
    """Refuse answers that are not wanted.

    A label that says no is refused, unless it is among classes: where a number is neither 1, 0 nor -1, or where there are more
    than two labels, of which none says yes. `false` is never a class. A warning names the labels that are not read.

    Args:
        labels: of each answer that would count as wanted, where it comes from and its label; null and blanks say nothing.
        ignored: whether the user named the columns that count; then a warning takes the refusal's place.

    Raises:
        DataError: names the first that is not wanted, and the cure.
    """
    read = {place: _read(label) for place, label in labels}
    values = {value for value in read.values() if value is not None}
    unwanted = [place for place, value in read.items() if value is False or (_verdict(value) is False and not _classes(values))]
    if unwanted and not ignored:
        raise DataError(
            f"{unwanted[0]}: '{LABEL}' says that the answer is not wanted, as it does of {len(unwanted)} of {len(labels)}"
            f" answers: keep the records with {LABEL}=true, or pair the answers to a prompt as 'chosen' and 'rejected'; if"
            f" '{LABEL}' means something else, name the columns that count:"
            " --columns prompt=prompt --columns completion=completion"
        )
    if unread := [place for place, value in read.items() if value is not None and not _verdict(value)]:
        shown = ", ".join(sorted(map(str, values))[:5])
        logger.warning("%s: '%s' (%s) is not read: each answer counts as wanted", unread[0], LABEL, shown)


def _read(label: Any) -> bool | float | str | None:
    """A label without the ways of writing it: a truth value, a number, or a word in small letters; None says nothing."""
    while isinstance(label, (list, tuple)) and len(label) == 1:
        label = label[0]
    if isinstance(label, bool) or label is None:
        return label
    text = str(label).strip().lower()
    if text in _NOTHING:
        return None
    with contextlib.suppress(ValueError):
        return float(text)
    word = "".join(text.split()).replace("_", "").replace("-", "").strip(".!,;:'\"") or text
    return WORDS[word] if word in ("true", "false") else word


def _verdict(value: bool | float | str | None) -> bool | None:
    """Whether a label says yes or no; None where it says neither."""
    return WORDS.get(value) if isinstance(value, str) else value if isinstance(value, bool | None) else NUMBERS.get(value)


def _classes(values: set[bool | float | str]) -> bool:
    """Whether labels are names or numbers of classes, or of a scale, though one of them might say no."""
    if any(_verdict(value) is None and not isinstance(value, str) for value in values):
        return True
    return len(values) > 2 and not {True, False} <= {_verdict(value) for value in values if value not in _SENTIMENTS}
