"""Which examples make an update, and how they are dealt to processes and micro-batches.

An *update* is one step of the optimiser, on `batch_size × accumulation × processes` examples, fewer at an epoch's end. Which
ones depends on the seed and the epoch alone; within an update, examples of like length share a micro-batch. Every example
counts once, or as often as its weight says: what is left over at the end is dealt evenly, and a process that gets nothing
runs an example that counts nothing, for all must take part. So the gradient is that of one process with one large batch,
however it is cut.

A weight n is the example n times in the order, and the same order as if the data had it n times in a row. What is between
whole numbers is a part of a loss: 2.5 is the example three times, with 5/6 of its loss each.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Sampler

__all__ = ["EpochLoader", "Pick", "Updates", "whole_passes"]

MEGA = 50
"""Updates whose examples are sorted by length together: enough to leave little padding, few enough to stay random."""


class Pick(NamedTuple):
    """One example of a micro-batch."""

    place: int
    """Which example of the data set."""
    share: float = 1.0
    """What its loss is multiplied with, so that sums over micro-batches, averaged over them and over processes, are means."""


class Updates(Sampler[list[Pick]]):
    """The micro-batches of one process, for one epoch after another.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a micro-batch.
        accumulation: micro-batches of each process in an update.
        rank, ranks: which process this is, of how many.
        seed: of the order.
        strategy: `random`; `sequential`; or `group_by_length`, where an update's examples are of like length too.
        drop_last: leave out the examples at the end of an epoch that do not fill an update.
        weights: how often each example counts; once, where nobody says.
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, accumulation: int = 1, rank: int = 0, ranks: int = 1, seed: int = 0,
        strategy: str = "random", drop_last: bool = False, weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        weights = [1.0] * len(lengths) if weights is None else weights
        times = [math.ceil(weight) for weight in weights]
        self._places = [place for place, often in enumerate(times) for _ in range(often)]
        mean = sum(weights) / len(self._places)
        self._shares = [weights[place] / times[place] / mean for place in self._places]
        lengths = [lengths[place] for place in self._places]
        self._lengths, self._batch_size, self._accumulation = lengths, batch_size, accumulation
        self._rank, self._ranks, self._seed, self._strategy = rank, ranks, seed, strategy
        self._update = batch_size * accumulation * ranks
        self._drop_last = drop_last and len(lengths) >= self._update
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has an order of its own."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self._lengths), self._update)
        return whole * self._accumulation + (0 if self._drop_last else self._micro_batches(rest))

    def __iter__(self) -> Iterator[list[Pick]]:
        for update in self._updates():
            yield from self._deal(update)

    def _micro_batches(self, examples: int) -> int:
        return -(-examples // (self._batch_size * self._ranks))

    def _updates(self) -> list[list[int]]:
        """The examples of each update, in order."""
        order, draw = list(range(len(self._lengths))), random.Random(f"{self._seed} {self._epoch}")
        if self._strategy != "sequential":
            draw.shuffle(order)
        size = self._update
        whole = len(order) // size * size
        rest = [] if self._drop_last or whole == len(order) else [order[whole:]]
        order = order[:whole]
        if self._strategy == "group_by_length":
            order = [i for at in range(0, whole, MEGA * size) for i in self._sorted(order[at : at + MEGA * size])]
        updates = [order[at : at + size] for at in range(0, whole, size)]
        if self._strategy == "group_by_length":
            draw.shuffle(updates)
        return updates + rest

    def _sorted(self, examples: Sequence[int]) -> list[int]:
        return sorted(examples, key=lambda i: self._lengths[i], reverse=True)

    def _deal(self, update: Sequence[int]) -> Iterator[list[Pick]]:
        """This process's micro-batches: slices of the update from long to short, neighbours at the same time."""
        order, steps = self._sorted(update), self._micro_batches(len(update))
        slices = steps * self._ranks
        for step in range(steps):
            mine = step * self._ranks + self._rank
            part = order[mine * len(order) // slices : (mine + 1) * len(order) // slices]
            share = slices / len(order) if part else 0.0
            yield [Pick(self._places[i], share * self._shares[i]) for i in part or order[-1:]]


class EpochLoader(DataLoader[Any]):
    """A loader over `Updates` that a trainer can tell the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Pass it on."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def whole_passes(batches: Sequence[Sequence[int]], rank: int, ranks: int) -> tuple[list[list[Pick]], int]:
    """One pass over all examples: the batches that they are in, dealt in turn to the processes.

    Returns:
        This process's batches, as many as every other one has, and how many of them count; at most one does not.
    """
    picks = [[Pick(i) for i in batch] for batch in batches]
    mine = picks[rank::ranks]
    return mine + picks[-1:] * (-(-len(picks) // ranks) - len(mine)), len(mine)
