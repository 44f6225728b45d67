"""How models with recurrent layers read: slots that take one token each together, those that take more one after the other.

A state cannot leave tokens out, so slots of a pass must take equally many; and it must not have read what was rolled back
(`trimtab.models.recurrent_slots`). Drafts are verified in one pass all the same: what has to be read again goes with it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.core.transfer import to_device
from trimtab.models.recurrent_slots import UNKNOWN, RecurrentState

__all__ = ["Reader"]

Pass = Callable[[RecurrentState, Tensor, Sequence[int], int], Tensor]
"""Logits `[B, n, W]` of the last n tokens of each slot of a state, which takes `counts[b]` of tokens `[B, K]`."""

KEPT_EVERY = 16
"""Tokens after which states are copied again. A slot that is rolled back reads at most about as many again."""
PIECE = 512
"""Tokens that are read again in one pass; bounds the memory of activations."""


class Reader:
    """Appends tokens to the slots of a `RecurrentState`.

    Args:
        run: makes a pass over slots whose states have read all before.
        tokenwise: whether a pass takes one token of a slot that has read some: what the layers of some families compute from
            several is right only where nothing stands before.
    """

    def __init__(self, run: Pass, *, tokenwise: bool) -> None:
        self._run, self._tokenwise = run, tokenwise

    def read(self, state: RecurrentState, tokens: Tensor, counts: Sequence[int], *, last_only: bool) -> Tensor:
        """Append to every slot.

        Args:
            state: advanced in place.
            tokens: ids `[B, K]`, on the model's device.
            counts: how many tokens each slot takes; at least one takes some.
            last_only: give the last token's logits only.

        Returns:
            `[B, K, W]`, or `[B, 1, W]`; what stands where a slot takes no token means nothing.
        """
        state.write(tokens, counts)
        slots = [slot for slot, count in enumerate(counts) if count]
        width = 1 if last_only else tokens.shape[1]
        if len(slots) > 1 and max(counts) == 1:
            for slot in slots:
                self._catch_up(state, slot, leave=0)
            logits = pad(self._together(state, tokens[:, :1], counts), (0, 0, 0, width - 1))
        else:
            rows = {slot: self._alone(state, slot, counts[slot], 1 if last_only else counts[slot]) for slot in slots}
            logits = _side_by_side(rows, len(counts), width)
        state.advance(counts)
        return logits

    def _alone(self, state: RecurrentState, slot: int, count: int, wanted: int) -> Tensor:
        """Read a slot's `count` new tokens; logits `[wanted, W]` of the last ones."""
        self._catch_up(state, slot, leave=KEPT_EVERY - 1)
        return self._read_on(state, slot, state.lengths[slot] + count, wanted)

    def _catch_up(self, state: RecurrentState, slot: int, *, leave: int) -> None:
        """Let a slot's states read what they have not, but for so few tokens, which are left to the next pass."""
        state.recall(slot)
        length = state.lengths[slot]
        if length - state.read[slot] > leave:
            while state.read[slot] < length:
                self._read_on(state, slot, min(length, state.read[slot] + PIECE), 1)
        if state.read[slot] == length >= state.kept_at[slot] + KEPT_EVERY:
            state.keep(slot)

    def _read_on(self, state: RecurrentState, slot: int, stop: int, wanted: int) -> Tensor:
        """Let a slot's states read up to its token `stop`; logits `[wanted, W]` of the last ones."""
        assert state.ids is not None
        start, state.read[slot] = state.read[slot], UNKNOWN  # until it has worked
        one = state.window(slot, slot + 1)
        one.lengths = [start]
        size = 1 if self._tokenwise and start else stop - start
        places = range(start, stop, size)
        ids = state.ids[slot : slot + 1]
        logits = [self._run(one, ids[:, place : place + size], [size], min(wanted, size)) for place in places]
        state.read[slot] = stop
        return torch.cat(logits, 1)[0, -wanted:]

    def _together(self, state: RecurrentState, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Let slots read one token `[B, 1]` each, or none; logits `[B, 1, W]`. Those that take one have read all before it."""
        idle = [slot for slot, count in enumerate(counts) if not count]
        before, state.read[: len(counts)] = state.read[: len(counts)], [UNKNOWN] * len(counts)
        all_of_them = state.window(0, len(counts))
        index = to_device(idle, tokens.device, torch.long)
        aside = [[part[index] for part in one.states] for one in all_of_them.recurrences] if idle else []
        logits = self._run(all_of_them, tokens, counts, 1)
        for one, parts in zip(all_of_them.recurrences, aside, strict=False):
            for part, was in zip(one.states, parts, strict=True):
                part[index] = was
        state.read[: len(counts)] = [read + count for read, count in zip(before, counts, strict=True)]
        return logits


def _side_by_side(rows: dict[int, Tensor], slots: int, width: int) -> Tensor:
    """Rows `[n, W]` of some slots as `[B, width, W]`."""
    some = next(iter(rows.values()))
    found = some.new_zeros(slots, width, some.shape[-1])
    for slot, row in rows.items():
        found[slot, : len(row)] = row
    return found
