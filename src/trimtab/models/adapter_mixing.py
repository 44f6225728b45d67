"""Steps whose slots use different adapters, or blends of them: what is put side by side for the lean pass.

`Gathered` has a row for each slot, with a copy of what the slot uses: any number of adapters, and a batch of small products.
The parts of a blend stand in its row behind each other, their weights folded into B, as the adapter of rank Σr that they are.

`Stacked` has each of a few adapters once, behind each other, for all slots: each slot's x·A is multiplied by what the slot's
blend takes of every adapter (0 for none) before it meets B. So a hundred different blends of three adapters are two plain
products of rank Σr and one of numbers, whatever their weights, and nothing is copied for a blend that is new.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.models.adapter_layout import Layout, Shape
from trimtab.models.adapter_values import Adapter, Blend
from trimtab.models.lean import Deltas

__all__ = ["FEW", "Gathered", "Stacked", "are_few", "distinct"]

FEW = 32
"""The most adapters that are stacked: each slot pays for all of them (benchmarks/RESULTS.md, Blends)."""


def are_few(values: Sequence[Adapter | Blend | None]) -> bool:
    """Whether what slots use is to be stacked: blends, of so few adapters together that it pays."""
    return any(isinstance(value, Blend) for value in values) and len(distinct(values)) <= FEW


def distinct(values: Sequence[Adapter | Blend | None]) -> list[Adapter]:
    """The adapters that these are made of, each once, in the order they come."""
    return list(dict.fromkeys(adapter for value in values if value is not None for adapter, _ in value.parts))


class Gathered:
    """Copies of the adapters of a state's first slots, side by side.

    Args:
        layout: the pool's.
        shape: one with room for all of the state's adapters.
        flat: `[rows, size]`, a row for each slot, not yet written.

    Attributes:
        held: references to the adapters of the rows that are written.
    """

    def __init__(self, layout: Layout, shape: Shape, flat: Tensor) -> None:
        self.shape, self.rows = shape, len(flat)
        self.held: list[Any] = []
        self._layout, self._flat = layout, flat
        self._deltas: dict[int, Deltas] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that the copies take."""
        return self._flat.nbytes

    def write(self, row: int, adapter: Adapter | Blend | None) -> None:
        """Put an adapter, a blend, or none, into a row that is written or the first that is not."""
        self.held[row : row + 1] = [None if adapter is None else adapter.reference]
        target = self._flat[row : row + 1]
        if isinstance(adapter, Adapter) and adapter.shape == self.shape:
            target.copy_(adapter.flat)
            return
        target.zero_()
        start = 0
        for part, weight in () if adapter is None else adapter.parts:
            self._layout.place(part.flat[None], part.shape, target, self.shape, start, weight)
            start += part.shape.rank

    def deltas(self, slots: int) -> Deltas:
        """The pairs of the first rows."""
        if slots not in self._deltas:
            self._deltas[slots] = self._layout.deltas(self._flat[:slots], self.shape)
        return self._deltas[slots]


class Stacked:
    """A few adapters, each once, and what each slot takes of them.

    Args:
        layout: the pool's.
        adapters: at least one.
        for_good: whether it stays where a state uses fewer of them; otherwise it makes room.
    """

    def __init__(self, layout: Layout, adapters: Sequence[Adapter], *, for_good: bool = False) -> None:
        self._for_good = for_good
        self._place = {adapter.reference: i for i, adapter in enumerate(adapters)}
        self._layout, self._ranks = layout, [adapter.shape.rank for adapter in adapters]
        self._shape = Shape.beside(adapter.shape for adapter in adapters)
        flat = adapters[0].flat
        self._flat, start = flat.new_zeros(1, layout.size(self._shape)), 0
        for adapter in adapters:
            layout.place(adapter.flat[None], adapter.shape, self._flat, self._shape, start, 1.0)
            start += adapter.shape.rank
        self._pairs = layout.deltas(self._flat, self._shape)
        self._taken: list[Any] | None = None
        self._deltas: Deltas = []

    @property
    def num_bytes(self) -> int:
        """Memory that the copies take."""
        return self._flat.nbytes

    def serves(self, adapters: Sequence[Adapter]) -> bool:
        """Whether it holds these, and nothing beside them that takes memory for nobody."""
        held = all(adapter.reference in self._place for adapter in adapters)
        return held and (self._for_good or len(adapters) == len(self._place))

    def deltas(self, values: Sequence[Adapter | Blend | None]) -> Deltas:
        """The pairs, with what each of the slots that use these takes of them, or what all do."""
        if all(value == values[0] for value in values):
            values = values[:1]  # what all take stands there once
        taken = [None if value is None else value.reference for value in values]
        if taken != self._taken:
            self._taken, self._deltas = taken, self._layout.shared(self._pairs, self._shape, self._shares(values))
        return self._deltas

    def _shares(self, values: Sequence[Adapter | Blend | None]) -> Tensor:
        """`[slots, rank]`: each slot's weight of every adapter, as often as the adapter has ranks."""
        weights = torch.zeros(len(values), len(self._place), dtype=torch.float64)
        for slot, value in enumerate(values):
            for adapter, weight in () if value is None else value.parts:
                weights[slot, self._place[adapter.reference]] = weight
        repeated = weights.repeat_interleave(torch.tensor(self._ranks), dim=1)
        return repeated.to(device=self._flat.device, dtype=self._flat.dtype)
