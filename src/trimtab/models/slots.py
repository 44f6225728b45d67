"""The ragged key/value cache: a transformers `Cache` whose rows have lengths of their own.

Each layer owns one buffer for keys and one for values, `[B, H, L + 1, D]`. A step writes the keys of slot b at `length[b] + j`;
positions that a slot does not use go to the last column, which no query ever sees. Forgetting is lowering a length: stale
entries are masked, then overwritten. A step over the first slots works on views of the buffers. So no step costs a copy of the
past, whatever each slot did before.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from trimtab.core.transfer import to_device
from trimtab.models.attention import without_cudnn
from trimtab.models.base import State
from trimtab.models.masks import FULL, Sight

__all__ = ["SlotState", "Step"]


class Step(NamedTuple):
    """Where the tokens of one forward pass go, and what they may look at."""

    position_ids: Tensor
    """`[B, K]` the place of each token in its own slot; unused tokens get the last allowed place."""
    start: int | None
    """The first column that is written to, where there is one slot only and it uses all its tokens."""
    rows: Tensor | None
    """`[B, 1]` the number of each slot, otherwise."""
    write: Tensor | None
    """`[B, K]` the column that each key and value is written to, otherwise."""
    used: int
    """How many columns any slot uses after this step."""
    reach: int
    """All positions are below this."""
    unmasked: bool
    """Whether every query may look at every column, as far as its layer sees."""

    def mask(self, sight: Sight = FULL) -> Tensor:
        """`[B, 1, K, used]` True where a query looks, in layers that see so much."""
        return sight.mask(self.position_ids, self.used)

    def additive_mask(self, dtype: torch.dtype, sight: Sight = FULL) -> Tensor:
        """The mask as something to add to attention scores."""
        mask = self.mask(sight)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one attention layer."""

    is_sliding = False

    def __init__(self, slots: "SlotState") -> None:
        super().__init__()
        self.slots: SlotState = weakref.proxy(slots)  # or buffers and graphs would stay until garbage is collected

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros, for stale or unused entries must be finite even though they are masked."""
        slots, columns, heads = len(self.slots), self.slots.capacity + 1, key_states.shape[1]
        self.keys = key_states.new_zeros(slots, heads, columns, key_states.shape[-1])
        self.values = value_states.new_zeros(slots, heads, columns, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, H, K, D]` at the current step's columns; the past and present `[B, H, used, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.slots.step
        assert step is not None, "the cache is written only inside SlotState.advance"
        batch = len(step.position_ids)
        if step.start is not None:  # one slot: a plain copy is several times cheaper than an indexed one
            self.keys[0, :, step.start : step.used] = key_states[0]
            self.values[0, :, step.start : step.used] = value_states[0]
        else:
            assert step.rows is not None
            assert step.write is not None
            where = step.rows.to(self.keys.device), slice(None), step.write.to(self.keys.device)  # layers may be spread
            self.keys[where] = key_states.transpose(1, 2)
            self.values[where] = value_states.transpose(1, 2)
        return self.keys[:batch, :, : step.used], self.values[:batch, :, : step.used]

    def wipe(self, slot: int) -> None:
        """Zero a slot."""
        if self.is_initialized:
            self.keys[slot] = self.values[slot] = 0

    def copy(self, slots: Sequence[int], target: "SlotLayer", to: Sequence[int], used: int) -> None:
        """Copy the first `used` columns of these slots into slots of another layer."""
        if self.is_initialized:
            if not target.is_initialized:
                target.lazy_initialization(self.keys, self.values)
            index = to_device([list(slots), list(to)], self.keys.device)
            target.keys[index[1], :, :used] = self.keys[index[0], :, :used]
            target.values[index[1], :, :used] = self.values[index[0], :, :used]

    def share(self, start: int, stop: int, view: "SlotLayer") -> None:
        """Make `view` slots `start` … `stop` − 1 of this one, on the same memory."""
        if self.is_initialized:
            view.keys, view.values, view.is_initialized = self.keys[start:stop], self.values[start:stop], True

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
        self.gathered: Any = None  # the adapters of the last mixed step, side by side: `trimtab.models.adapters.Gathered`
        self.graphs: dict[Any, Any] = {}  # of `trimtab.models.graphs`
        self.layers = [SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=self.layers)

    @property
    def used(self) -> int:
        """How many columns the longest slot uses."""
        return max(self.lengths, default=0)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory; nothing before the first step."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def plan(self, counts: Sequence[int], width: int, last_position: int, device: torch.device) -> Step:
        """Lay out a step of `width` tokens for the first slots, of which slot b uses the first `counts[b]`."""
        before = self.lengths[: len(counts)]
        used = max(1, *(length + count for length, count in zip(before, counts, strict=True)))
        if len(counts) == 1 and counts[0] == width:
            last = min(last_position, self.capacity)
            positions = torch.arange(before[0], used, device=device)[None]
            return Step(positions.clamp(max=last), before[0], None, None, used, last + 1, unmasked=width == 1)
        lengths, taken = to_device([before, list(counts)], device).unsqueeze(-1)
        unmasked = width == 1 and all(length + count == used for length, count in zip(before, counts, strict=True))
        return self.lay_out(lengths, taken, width, used, last_position)._replace(unmasked=unmasked)

    def lay_out(self, lengths: Tensor, taken: Tensor, width: int, used: int, last_position: int) -> Step:
        """The step of slots of these lengths `[B, 1]` that take so many tokens `[B, 1]`, where `used` columns suffice."""
        last = min(last_position, self.capacity)
        column = torch.arange(width, device=lengths.device)
        positions = lengths + column
        rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        write = torch.where(column < taken, positions, self.capacity)
        return Step(positions.clamp(max=last), None, rows, write, used, last + 1, unmasked=False)

    @contextmanager
    def stepping(self, counts: Sequence[int], width: int, last_position: int, device: torch.device) -> Iterator[Step]:
        """`plan`, in force inside the `with`; the slots are longer behind it, unless it failed."""
        self.step = step = self.plan(counts, width, last_position, device)
        try:
            with without_cudnn(device):
                yield step
        finally:
            self.step = None
        self.advance(counts)

    def wipe(self, slot: int) -> None:
        """Zero a slot's keys and values."""
        for layer in self.layers:
            layer.wipe(slot)

    def copy(self, slots: Sequence[int], target: "SlotState", to: Sequence[int]) -> None:
        """Copy what these slots use into slots of `target`."""
        used = max(self.lengths[slot] for slot in slots)
        for mine, its in zip(self.layers, target.layers, strict=True):
            mine.copy(slots, its, to, used)
        for slot, other in zip(slots, to, strict=True):
            target.lengths[other], target.adapters[other] = self.lengths[slot], self.adapters[slot]

    def window(self, start: int, stop: int) -> Self:
        """Slots `start` … `stop` − 1 as a state of their own, on the same memory, which must have been allocated by a step.

        What is appended there stands here, too, once the lengths are taken over.
        """
        view = self._like(self.lengths[start:stop])
        view.adapters = self.adapters[start:stop]
        for mine, its in zip(self.layers, view.layers, strict=True):
            mine.share(start, stop, its)
        return view

    def select(self, rows: Sequence[int]) -> Self:
        """Copies of the given slots."""
        selected = self._like([0] * len(rows))
        self.copy(rows, selected, range(len(rows)))
        return selected

    def _like(self, lengths: Sequence[int]) -> Self:
        """Slots of the same model, without memory."""
        return type(self)(lengths, self.capacity, len(self.layers))
