"""Slots of models with layers that fold what they have read into a state: convolutions, linear attention, Mamba.

Such a state cannot be masked, and it forgets nothing. So a slot also keeps its tokens, and a copy of its states as they were
some tokens ago. A slot that was rolled back goes on from the copy, or from the beginning if the copy has read too much, and
reads again what lies between. Nothing has to be done when lengths are lowered: `read` tells how many tokens the states have
read, and where that is not the slot's length, they are `recall`ed before the next step.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from trimtab.core.transfer import to_device
from trimtab.models.slots import SlotLayer, SlotState

__all__ = ["UNKNOWN", "Layout", "RecurrentState", "layout_of"]

UNKNOWN = -1
"""What states have read after a step that failed."""


class Recurrence(LinearAttentionLayer):  # type: ignore[misc]  # transformers is untyped here
    """The states of one layer, `[B, …]` each, as transformers' modules write them."""

    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]
    is_conv_states_initialized: dict[int, bool]
    is_recurrent_states_initialized: dict[int, bool]
    conv_kernel_size: dict[int, int | None]
    has_previous_state: dict[int, bool]
    device: torch.device | None
    dtype: torch.dtype | None

    @property
    def states(self) -> list[Tensor]:
        """Those that the layer has; none before the first step."""
        return [state for state in (*self.conv_states.values(), *self.recurrent_states.values()) if state is not None]

    def hand_over(self, slots: Sequence[int], target: "Recurrence", to: Sequence[int], total: int) -> None:
        """Copy slots into those of another layer, which has `total`."""
        if not self.states:
            return
        if not target.states:
            target.become(self, lambda state: state.new_zeros(total, *state.shape[1:]))
        for mine, its in zip(self.states, target.states, strict=True):
            index = to_device([list(slots), list(to)], mine.device)
            its[index[1]] = mine[index[0]]

    def become(self, other: "Recurrence", made: Callable[[Tensor], Tensor]) -> None:
        """Take over another layer, with what is made of its states."""
        self.conv_states = {i: None if state is None else made(state) for i, state in other.conv_states.items()}
        self.recurrent_states = {i: None if state is None else made(state) for i, state in other.recurrent_states.items()}
        self.is_conv_states_initialized = dict(other.is_conv_states_initialized)
        self.is_recurrent_states_initialized = dict(other.is_recurrent_states_initialized)
        self.conv_kernel_size = dict(other.conv_kernel_size)
        self.has_previous_state = dict.fromkeys(other.has_previous_state, bool(other.states))  # zeros have read nothing
        self.device, self.dtype = other.device, other.dtype


class AttentionAndRecurrence(Recurrence, SlotLayer):
    """A layer that has both, side by side."""

    def __init__(self, slots: SlotState, number_of_states: int) -> None:
        SlotLayer.__init__(self, slots)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values come in their order, states by name."""
        (SlotLayer if args else Recurrence).lazy_initialization(self, *args, **kwargs)


Layout = Sequence[tuple[bool, int]]
"""For each layer, whether it attends, and how many pairs of states it has."""


def layout_of(config: Any) -> Layout:
    """As transformers' own cache would be laid out. A layer with nothing to keep gets a place that stays empty."""
    layers = DynamicCache(config=config).layers
    counts = [layer.number_of_states if isinstance(layer, LinearAttentionLayer) else 0 for layer in layers]
    return [(isinstance(layer, DynamicLayer), count) for layer, count in zip(layers, counts, strict=True)]


class RecurrentState(SlotState):
    """Slots of a model some of whose layers are recurrent.

    Args:
        lengths, capacity: as for others.
        layout: what each layer keeps.
        pattern: a state of one slot after a pass, to know shapes and dtypes from; None for what is to become one.

    Attributes:
        layers: keys and values of those that attend.
        recurrences: states of those that are recurrent.
        ids: `[B, capacity + 1]` the tokens of each slot, once there are any; the last column is for what no slot uses.
        read: how many of them its states have read.
        kept_at: how many they had read when they were copied.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, layout: Layout, pattern: "RecurrentState | None" = None) -> None:
        super().__init__(lengths, capacity, 0)
        self._layout, self._pattern = layout, pattern
        places = [self._place(*place) for place in layout]
        self.layers = [place for place in places if isinstance(place, SlotLayer)]
        self.recurrences = [place for place in places if isinstance(place, Recurrence)]
        self._kept = [Recurrence(one.number_of_states) for one in self.recurrences]
        self.cache = Cache(layers=places)
        self.ids: Tensor | None = None
        self.read = [0] * len(self.lengths)
        self.kept_at = [0] * len(self.lengths)

    def _place(self, attends: bool, states: int) -> SlotLayer | Recurrence:
        if attends and states:
            return AttentionAndRecurrence(self, states)
        return Recurrence(states) if states else SlotLayer(self)

    @property
    def is_allocated(self) -> bool:
        """Whether any step was made."""
        return bool(self.recurrences[0].states)

    @property
    def fixed_bytes(self) -> int:
        """What the states of all slots take, their copies among it, however long the texts are."""
        return 2 * sum(state.nbytes for one in self.recurrences for state in one.states)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory; nothing before the first step."""
        return super().num_bytes + self.fixed_bytes + (self.ids.nbytes if self.ids is not None else 0)

    def write(self, tokens: Tensor, counts: Sequence[int]) -> None:
        """Note the tokens `[B, K]` of a step, of which slot b takes the first `counts[b]`."""
        if self.ids is None:
            self._allocate()
            self.ids = tokens.new_zeros(len(self), self.capacity + 1)
        before, taken = to_device([self.lengths[: len(counts)], list(counts)], tokens.device).unsqueeze(-1)
        column = torch.arange(tokens.shape[1], device=tokens.device)
        rows = torch.arange(len(counts), device=tokens.device)[:, None]
        self.ids[rows, torch.where(column < taken, before + column, self.capacity)] = tokens

    def _allocate(self) -> None:
        """Memory like that of the pattern; zeros are the states of nothing."""
        assert self._pattern is not None
        for mine, its in zip(self.layers, self._pattern.layers, strict=True):
            if its.is_initialized and not mine.is_initialized:
                mine.lazy_initialization(its.keys, its.values)
        for ours in (self.recurrences, self._kept):
            for one, pattern in zip(ours, self._pattern.recurrences, strict=True):
                if not one.states:
                    one.become(pattern, lambda state: state.new_zeros(len(self), *state.shape[1:]))

    def recall(self, slot: int) -> None:
        """Make states that do not belong to a slot's tokens those of its first ones: the copy, or those of nothing."""
        if self.read[slot] == self.lengths[slot]:
            return
        if self.kept_at[slot] > self.lengths[slot] or not self.kept_at[slot]:
            self._clear(slot)
            return
        for kept, one in zip(self._kept, self.recurrences, strict=True):
            kept.hand_over([slot], one, [slot], len(self))
        self.read[slot] = self.kept_at[slot]

    def keep(self, slot: int) -> None:
        """Copy a slot's states, to come back to."""
        self.kept_at[slot] = 0  # until it has worked
        for one, kept in zip(self.recurrences, self._kept, strict=True):
            one.hand_over([slot], kept, [slot], len(self))
        self.kept_at[slot] = self.read[slot]

    def _clear(self, slot: int) -> None:
        for one in self.recurrences:
            for state in one.states:
                state[slot] = 0
        self.read[slot] = self.kept_at[slot] = 0

    def known(self, slot: int, length: int) -> int:
        """All if its states have read them and no more; else those that the copy has read, or none."""
        if self.read[slot] == length:
            return length
        return self.kept_at[slot] if self.kept_at[slot] <= length else 0

    def wipe(self, slot: int) -> None:
        """Zero a slot."""
        super().wipe(slot)
        self._clear(slot)

    def copy(self, slots: Sequence[int], target: SlotState, to: Sequence[int]) -> None:
        """Copy slots with all that they know."""
        assert isinstance(target, RecurrentState)
        for other in to:  # until it has worked
            target.read[other], target.kept_at[other] = UNKNOWN, 0
        super().copy(slots, target, to)
        for mine, its in zip([*self.recurrences, *self._kept], [*target.recurrences, *target._kept], strict=True):
            mine.hand_over(slots, its, to, len(target))
        if self.ids is not None:
            if target.ids is None:
                target.ids = self.ids.new_zeros(len(target), target.capacity + 1)
            index, width = to_device([list(slots), list(to)], self.ids.device), max(self.lengths[slot] for slot in slots)
            target.ids[index[1], :width] = self.ids[index[0], :width]
        for slot, other in zip(slots, to, strict=True):
            target.read[other] = self.read[slot] if self.is_allocated else UNKNOWN  # whatever is there
            target.kept_at[other] = self.kept_at[slot]

    def window(self, start: int, stop: int) -> Self:
        """Slots `start` … `stop` − 1 for one pass over them: without their tokens and copies."""
        view = super().window(start, stop)
        for mine, its in zip(self.recurrences, view.recurrences, strict=True):
            its.become(mine, lambda state: state[start:stop])
        return view

    def _like(self, lengths: Sequence[int]) -> Self:
        return type(self)(lengths, self.capacity, self._layout, self._pattern)
