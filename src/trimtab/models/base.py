"""`LanguageModel`: whatever turns prefixes into next-token log-probabilities, many prefixes at once.

A model keeps its prefixes in a `State` of B *slots*, each with a length of its own. Slots advance by different amounts
(`extend`, `prefill`), forget their last tokens in O(1) (`rollback`) and are copied (`copy`, `select`). A step may leave the
last slots out, so that a batch shrinks and grows inside one state. Every implementation passes one contract suite
(tests/models/test_contract.py): chunked = stepwise, cached = uncached, batched = alone, rollback and copies = recompute.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.errors import InvalidRequest

__all__ = ["LanguageModel", "State", "is_immutable", "last_of", "vacate"]


class State:
    """B slots with a length each; implementations subclass it to keep what they remember.

    Attributes:
        lengths: tokens held by each slot. They live on the host, so that nothing has to be fetched to plan a step.
        capacity: the most tokens that a slot can hold.
        adapters: what each slot adds to the model's weights (`trimtab.models.adapters`), or None for nothing. Copies of a slot
            keep it; models without adapters pay no heed to it. Set it while the slot is empty.
    """

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self.lengths = list(lengths)
        self.capacity = capacity
        self.adapters: list[Any] = [None] * len(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def known(self, slot: int, length: int) -> int:
        """How many of a slot's first `length` tokens need not be read again where it is rolled back to them."""
        return length

    def wipe(self, slot: int) -> None:
        """Overwrite what a slot has held and hides, if it would do harm there: a masked NaN is NaN all the same."""

    def check_room(self, tokens: Tensor, counts: Sequence[int]) -> None:
        """Refuse a step that does not fit this state, before it changes anything."""
        if tokens.ndim != 2 or not 0 < tokens.shape[0] == len(counts) <= len(self):
            given = f"{list(tokens.shape)}, {len(counts)}"
            raise InvalidRequest(f"tokens must be [B, K] with B counts, B from 1 to {len(self)} slots, not {given}")
        for slot, (length, count) in enumerate(zip(self.lengths, counts, strict=False)):
            if not 0 <= count <= tokens.shape[1]:
                raise InvalidRequest(f"counts[{slot}] is {count}, but the step has {tokens.shape[1]} tokens a slot")
            if length + count > self.capacity:
                raise InvalidRequest(f"slot {slot} holds {length} of {self.capacity} tokens; {count} more do not fit")

    def check_rollback(self, counts: Sequence[int]) -> None:
        """Refuse to forget more than a slot holds."""
        if len(counts) > len(self):
            raise InvalidRequest(f"there are {len(self)} slots, but {len(counts)} counts")
        for slot, (length, count) in enumerate(zip(self.lengths, counts, strict=False)):
            if not 0 <= count <= length:
                raise InvalidRequest(f"slot {slot} holds {length} tokens and cannot forget {count}")

    def advance(self, counts: Sequence[int], sign: int = 1) -> None:
        """Lengthen the first slots by `counts`, or shorten them with `sign` −1."""
        for slot, count in enumerate(counts):
            self.lengths[slot] += sign * count


class LanguageModel(Protocol):
    """A causal language model over token ids 0 … `vocab_size` − 1. A state belongs to the model that made it."""

    @property
    def vocab_size(self) -> int:
        """V, without padding columns."""

    @property
    def max_length(self) -> int | None:
        """The most tokens a prefix may have, or None where nothing limits it."""

    @property
    def device(self) -> torch.device:
        """Where rows come out and tokens should go in."""

    def new_state(self, slots: int, capacity: int) -> State:
        """Empty slots that can hold `capacity` tokens each."""

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """What such a state takes in memory once it is written.

        Args:
            slots: how many.
            capacity: tokens that each can hold.
            adapters: those that its slots use, None among them for a slot without.
        """

    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot and return the next-token rows after each appended token.

        Args:
            state: advanced in place.
            tokens: ids `[B, K]` for the first B slots; slot b takes the first `counts[b]` of its row.
            counts: how many tokens each slot takes, 0 … K.

        Returns:
            Log-probabilities `[B, K, V]`; what stands at `[b, j]` with j ≥ `counts[b]` means nothing.
        """

    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """`extend` where only the row `[B, 1, V]` after each slot's last token is wanted; it means nothing if there is none."""

    def rollback(self, state: State, counts: Sequence[int]) -> None:
        """Forget the last `counts[b]` tokens of each of the first slots, in place."""

    def copy(self, source: State, slots: Sequence[int], target: State, to: Sequence[int]) -> None:
        """Make slots `to` of `target` copies of `slots` of `source`, which may be the same state if none is in both lists."""

    def select(self, state: State, rows: Sequence[int]) -> State:
        """A new state whose slots are copies of the given ones, which may repeat or be left out."""


def is_immutable(model: LanguageModel) -> bool:
    """Whether nobody changes a model while it is used, so that its states hold for good: those with `immutable = True`."""
    return bool(getattr(model, "immutable", False))


def vacate(model: LanguageModel, state: State, slot: int, last: int) -> None:
    """Empty a slot by moving the last one that is in use into it."""
    if slot != last:
        model.copy(state, [last], state, [slot])
    state.lengths[last] = 0
    state.adapters[last] = None


def last_of(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Of values `[B, K, …]` those `[B, 1, …]` of each slot's last token, of `counts[b]`; where it has none, any."""
    if all(count == values.shape[1] for count in counts):
        return values[:, -1:]
    last = to_device([max(count, 1) - 1 for count in counts], values.device)
    return values[torch.arange(len(values), device=values.device), last].unsqueeze(1)
