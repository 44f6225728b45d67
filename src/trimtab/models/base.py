"""`LanguageModel`: whatever turns prefixes into next-token log-probabilities, many prefixes at once.

A model keeps its prefixes in a `State` of B *slots*, each with a length of its own. Slots advance by different amounts
(`extend`, `prefill`), forget their last tokens in O(1) (`rollback`) and are copied or dropped (`select`). Every implementation
passes one contract suite (tests/models/test_contract.py): chunked = stepwise, cached = uncached, batched = alone, rollback and
select = recompute.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trimtab.errors import InvalidRequest

__all__ = ["LanguageModel", "State"]


class State:
    """B slots with a length each; implementations subclass it to keep what they remember.

    Attributes:
        lengths: tokens held by each slot. They live on the host, so that nothing has to be fetched to plan a step.
        capacity: the most tokens that a slot can hold.
    """

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self.lengths = list(lengths)
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self.lengths)

    def check_room(self, tokens: Tensor, counts: Sequence[int]) -> None:
        """Refuse a step that does not fit this state, before it changes anything."""
        if tokens.ndim != 2 or tokens.shape[0] != len(self) or len(counts) != len(self):
            raise InvalidRequest(
                f"tokens must be [{len(self)}, K] with as many counts, not {list(tokens.shape)}, {len(counts)}"
            )
        for slot, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if not 0 <= count <= tokens.shape[1]:
                raise InvalidRequest(f"counts[{slot}] is {count}, but the step has {tokens.shape[1]} tokens a slot")
            if length + count > self.capacity:
                raise InvalidRequest(f"slot {slot} holds {length} of {self.capacity} tokens; {count} more do not fit")

    def check_rollback(self, counts: Sequence[int]) -> None:
        """Refuse to forget more than a slot holds."""
        for slot, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if not 0 <= count <= length:
                raise InvalidRequest(f"slot {slot} holds {length} tokens and cannot forget {count}")


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

    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot and return the next-token rows after each appended token.

        Args:
            state: advanced in place.
            tokens: ids `[B, K]`; slot b takes the first `counts[b]` of its row.
            counts: how many tokens each slot takes, 0 … K.

        Returns:
            Log-probabilities `[B, K, V]`; what stands at `[b, j]` with j ≥ `counts[b]` means nothing.
        """

    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> None:
        """`extend` where nobody wants the rows."""

    def rollback(self, state: State, counts: Sequence[int]) -> None:
        """Forget the last `counts[b]` tokens of each slot, in place."""

    def select(self, state: State, rows: Sequence[int]) -> State:
        """A new state whose slots are copies of the given ones, which may repeat or be left out."""
