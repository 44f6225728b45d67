"""What two answers do not have in common: against every common subsequence, and at the ends of what it may be."""

from array import array
from itertools import combinations, product

import pytest

from trimtab.data.edits import find_edits

STRINGS = [list(ids) for length in range(5) for ids in product((3, 5, 9), repeat=length)]


def kept(ids, marks):
    return [token for token, marked in zip(ids, marks, strict=True) if not marked]


def subsequences(ids):
    return {some for length in range(len(ids) + 1) for some in combinations(ids, length)}


def test_what_is_kept_is_a_longest_common_subsequence_of_all_short_strings():
    """Of all 121² pairs of up to four of three letters: the same tokens of both, and as many as any two have in common."""
    inside = [subsequences(ids) for ids in STRINGS]
    for one, its in zip(STRINGS, inside, strict=True):
        for other, others in zip(STRINGS, inside, strict=True):
            edits = find_edits(one, other)
            assert kept(one, edits.inserted) == kept(other, edits.deleted)
            assert len(kept(one, edits.inserted)) == max(map(len, its & others)), (one, other)


def marks(text):
    return [mark == "+" for mark in text]


@pytest.mark.parametrize(
    ("chosen", "rejected", "inserted", "deleted"),
    [
        ([1, 2, 3], [1, 2, 3], "---", "---"),
        ([1, 2, 3], [4, 5], "+++", "++"),
        ([1, 2, 7, 3], [1, 2, 3], "--+-", "---"),
        ([1, 2, 3], [1, 8, 9, 3], "-+-", "-++-"),
        ([1, 2, 2, 3], [1, 2, 3], "--+-", "---"),  # the beginning first: of two alike the second is the edit
        ([5, 1, 6], [7, 1, 1, 8], "+-+", "+-++"),  # as early as it can be
        ([5, 1, 2, 6], [7, 2, 1, 8], "++-+", "+-++"),  # of two that cross, the one that is rejected earlier
        ([], [4, 5], "", "++"),
    ],
)
def test_of_several_it_is_always_the_same(chosen, rejected, inserted, deleted):
    assert find_edits(chosen, rejected) == (marks(inserted), marks(deleted))
    assert find_edits(array("i", chosen), array("i", rejected)) == (marks(inserted), marks(deleted))


@pytest.mark.parametrize(
    ("margin", "inserted", "deleted"),
    [(0, "----+--", "------"), (1, "---+++-", "------"), (2, "--+++++", "------"), (9, "+++++++", "------")],
)
def test_a_margin_is_of_neighbours_in_the_same_answer(margin, inserted, deleted):
    edits = find_edits([1, 2, 3, 4, 9, 5, 6], [1, 2, 3, 4, 5, 6], margin)
    assert edits == (marks(inserted), marks(deleted))


def test_margins_of_several_edits_meet():
    assert find_edits([9, 1, 2, 3, 4, 9], [1, 2, 3, 4], 1) == (marks("++--++"), marks("----"))
    assert find_edits([9, 1, 2, 3, 4, 9], [1, 2, 3, 4], 2) == (marks("++++++"), marks("----"))
