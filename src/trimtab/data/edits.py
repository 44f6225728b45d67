"""Which tokens make one answer of the other: those that a longest common subsequence of both lacks.

It is found a row at a time, in integers of as many bits as an answer has tokens (Hyyrö, Bit-parallel LCS-length computation
revisited, 2004). Two answers of T tokens take T operations on T bits, and T²/8 bytes until the subsequence has been read.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

__all__ = ["Edits", "find_edits"]


class Edits(NamedTuple):
    """Which tokens of two answers are edits."""

    inserted: list[bool]
    """For each token of the chosen answer."""
    deleted: list[bool]
    """For each token of the rejected one."""


def find_edits(chosen: Sequence[int], rejected: Sequence[int], margin: int = 0) -> Edits:
    """The tokens that are not in a longest common subsequence, with `margin` neighbours on both sides of each.

    Where there are several, it is the one of the common beginning, of the common end of what is left, and between them of
    tokens that stand as early as they can: its last one in the rejected answer, then in the chosen one, and so on backwards.
    Neighbours are of the same answer: one that has no edit has none.
    """
    head = _shared(chosen, rejected)
    tail = _shared(reversed(chosen[head:]), reversed(rejected[head:]))
    between = _align(chosen[head : len(chosen) - tail], rejected[head : len(rejected) - tail])
    return Edits(*(_widen([False] * head + marks + [False] * tail, margin) for marks in between))


def _shared(one: Iterable[int], other: Iterable[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _align(chosen: Sequence[int], rejected: Sequence[int]) -> Edits:
    """The same without a margin, and whatever is common at the ends.

    Bit j of row i is 0 where the first j + 1 rejected tokens have a longer subsequence in common with the first i chosen ones
    than the first j have.
    """
    places: dict[int, int] = {}
    for j, token in enumerate(rejected):
        places[token] = places.get(token, 0) | 1 << j
    every = (1 << len(rejected)) - 1
    rows = [every]
    for token in chosen:
        row = rows[-1]
        met = row & places.get(token, 0)
        rows.append((row + met | row - met) & every)
    inserted, deleted = [True] * len(chosen), [True] * len(rejected)
    i, j = len(chosen), len(rejected)
    while i and j:
        if rows[i] >> j - 1 & 1:  # as many without the rejected token
            j -= 1
        elif not rows[i - 1] >> j - 1 & 1:  # as many without the chosen one
            i -= 1
        else:
            i, j = i - 1, j - 1
            inserted[i] = deleted[j] = False
    return Edits(inserted, deleted)


def _widen(marks: list[bool], margin: int) -> list[bool]:
    """The marks and `margin` neighbours on both sides of each."""
    before = [0, *accumulate(marks)]
    return [before[min(i + margin + 1, len(marks))] > before[max(i - margin, 0)] for i in range(len(marks))]
