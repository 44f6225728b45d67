"""The ragged key/value cache: a transformers `Cache` whose rows have lengths of their own.

Each layer owns one buffer for keys and one for values, `[B, H, L + 1, D]`. A step writes the keys of slot b at `length[b] + j`;
positions that a slot does not use go to the last column, which no query ever sees. Forgetting is lowering a length: stale
entries are masked, then overwritten. So a step costs no copy of the past, whatever each slot did before.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from trimtab.models.base import State

__all__ = ["SlotState", "Step"]


class Step(NamedTuple):
    """Where the tokens of one forward pass go, and what they may look at."""

    position_ids: Tensor
    """`[B, K]` the place of each token in its own slot; unused tokens get the last allowed place."""
    write: Tensor
    """`[B, K]` the column its key and value are written to."""
    mask: Tensor
    """`[B, 1, K, used]` True where a query may look."""
    used: int
    """How many columns any slot uses after this step."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one attention layer."""

    is_sliding = False

    def __init__(self, slots: "SlotState") -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros, for stale or unused entries must be finite even though they are masked."""
        columns = self.slots.capacity + 1
        batch, heads, _, key_width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, columns, key_width)
        self.values = value_states.new_zeros(batch, heads, columns, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, H, K, D]` at the current step's columns; the past and present `[B, H, used, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.slots.step
        assert step is not None, "the cache is written only inside SlotState.advance"
        rows = torch.arange(step.write.shape[0], device=step.write.device)[:, None]
        self.keys[rows, :, step.write] = key_states.transpose(1, 2)
        self.values[rows, :, step.write] = value_states.transpose(1, 2)
        return self.keys[:, :, : step.used], self.values[:, :, : step.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.slots.used, 0

    def get_seq_length(self) -> int:
        """Columns in use by the longest slot."""
        return self.slots.used

    def get_max_length(self) -> int:
        """Columns a slot can hold."""
        return self.slots.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class SlotState(State):
    """Slots of a transformers model, all layers together."""

    def __init__(self, lengths: Sequence[int], capacity: int, layers: int) -> None:
        super().__init__(lengths, capacity)
        self.step: Step | None = None
        self.layers = [SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=self.layers)

    @property
    def used(self) -> int:
        """How many columns the longest slot uses."""
        return max(self.lengths, default=0)

    def plan(self, counts: Sequence[int], width: int, last_position: int, device: torch.device) -> Step:
        """Lay out a step of `width` tokens a slot, of which slot b uses the first `counts[b]`."""
        lengths, taken = torch.tensor([self.lengths, list(counts)], device=device).unsqueeze(-1)
        column = torch.arange(width, device=device)
        positions = lengths + column
        used = max(1, *(length + count for length, count in zip(self.lengths, counts, strict=True)))
        seen = torch.arange(used, device=device) <= positions[:, None, :, None]
        return Step(positions.clamp(max=last_position), torch.where(column < taken, positions, self.capacity), seen, used)

    def select(self, rows: Sequence[int]) -> "SlotState":
        """Copies of the given slots."""
        copy = SlotState([self.lengths[row] for row in rows], self.capacity, len(self.layers))
        for mine, its in zip(self.layers, copy.layers, strict=True):
            if mine.is_initialized:
                index = torch.tensor(list(rows), dtype=torch.long, device=mine.keys.device)
                its.keys, its.values = mine.keys.index_select(0, index), mine.values.index_select(0, index)
                its.is_initialized = True
        return copy
