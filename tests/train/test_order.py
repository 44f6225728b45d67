"""Updates hold every example once, the same for any number of processes; shares make sums into means."""

import random
from itertools import pairwise

import pytest

from trimtab.train.order import Updates, whole_passes

LENGTHS = random.Random(0).sample(range(1, 100), 45)
CUTS = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 4)]
"""Micro-batch, accumulation, processes: eight examples in an update, so the sixth of 45 has five."""


def make(cut, rank=0, **settings):
    batch_size, accumulation, ranks = cut
    return Updates(LENGTHS, batch_size=batch_size, accumulation=accumulation, rank=rank, ranks=ranks, **settings)


def updates(cut, **settings):
    """For each update: the picks of all processes, and how many micro-batches each process has."""
    _, accumulation, ranks = cut
    everyone = [list(make(cut, rank, **settings)) for rank in range(ranks)]
    assert len({len(batches) for batches in everyone}) == 1
    assert all(len(batches) == len(make(cut, **settings)) for batches in everyone)
    return [
        (
            [pick for mine in everyone for batch in mine[at : at + accumulation] for pick in batch],
            len(everyone[0][at : at + accumulation]),
        )
        for at in range(0, len(everyone[0]), accumulation)
    ]


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("cut", CUTS)
def test_an_update_is_the_same_however_it_is_cut(cut, strategy):
    """Each example of an update counts 1/n, when micro-batches and then processes are averaged: Σ share / (steps · ranks)."""
    expected = [{pick.place for pick in picks} for picks, _ in updates(CUTS[0], strategy=strategy)]
    found = updates(cut, strategy=strategy)
    assert len(found) == len(expected) == 6
    for (picks, steps), places in zip(found, expected, strict=True):
        counting = [pick for pick in picks if pick.share]
        assert sorted(pick.place for pick in counting) == sorted(places)
        for pick in counting:
            assert pick.share / (steps * cut[2]) == pytest.approx(1 / len(places))
    assert sorted(place for places in expected for place in places) == list(range(45))


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    one = make(CUTS[0])
    first = list(one)
    assert list(one) == first
    one.set_epoch(1)
    assert list(one) != first
    assert list(make(CUTS[0], seed=1)) != first


def test_what_does_not_fill_an_update_may_be_left_out():
    assert len(make(CUTS[0], drop_last=True)) == 5
    assert len(list(make(CUTS[1], drop_last=True))) == 10


def test_grouping_by_length_leaves_little_padding():
    def padding(strategy):
        batches = [[LENGTHS[pick.place] for pick in batch] for batch in make((5, 1, 1), strategy=strategy)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches) / sum(LENGTHS)

    assert padding("random") > 0.4
    assert padding("group_by_length") < 0.15


def test_micro_batches_of_an_update_are_of_like_length():
    picks = list(make((2, 4, 1)))[:4]
    lengths = [[LENGTHS[pick.place] for pick in batch] for batch in picks]
    assert all(min(longer) >= max(shorter) for longer, shorter in pairwise(lengths))


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 8), (2, 8), (4, 7), (8, 9), (3, 45)])
def test_a_pass_has_every_example_once_and_equally_many_batches_everywhere(ranks, batch_size):
    batches = [list(range(45))[at : at + batch_size] for at in range(0, 45, batch_size)]
    everyone = [whole_passes(batches, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches, _ in everyone}) == 1
    assert sorted(pick.place for batches, count in everyone for batch in batches[:count] for pick in batch) == list(range(45))
    assert all(pick.share == 1 for batches, _ in everyone for batch in batches for pick in batch)
