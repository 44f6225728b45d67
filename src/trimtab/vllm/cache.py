"""An aligner's ragged cache beside vLLM's engine.

vLLM schedules; we follow. At each step it says which requests are in its batch, and which of them draw a token now. Each of
them has a *seat*: a slot of the aligner's state that holds a prefix of the request's tokens. Before a row can be had, what is
new of a prompt is read into the seat, and all drawing requests append their last token in one pass.

A request that leaves vLLM's batch may be done, preempted, or only left out of a step (with pipeline parallelism every other
step). So its seat is kept for a while, and a request that comes back with the same prompt and a continuation of what was read
takes it again. Everything else is read anew.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.models.adapter_mixing import FEW
from trimtab.models.adapter_values import Blend
from trimtab.models.adapters import AdapterPool
from trimtab.models.huggingface import HuggingFaceLM

__all__ = ["AlignerCache", "Ask", "Request", "blends"]

PATIENCE = 16
"""Steps that an empty seat is kept: a row of each pass is wasted on it."""


def blends(adapters: Sequence[Any]) -> bool:
    """Whether requests may blend these adapters of one model: few enough to be stacked, once, when vLLM starts."""
    return 0 < len(adapters) <= FEW


class Request:
    """One request in vLLM's batch.

    Args:
        prompt: its token ids.
        output: the ids drawn so far: vLLM's own list, which grows.

    Attributes:
        gone: it has left the batch.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        self.prompt, self.output = prompt, output
        self.gone = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Some of prompt and output."""
        split = len(self.prompt)
        return [*self.prompt[start:stop], *self.output[max(start - split, 0) : max(stop - split, 0)]]


class Ask(NamedTuple):
    """What a request wants of an aligner at a step."""

    request: Request
    adapter: Any = None
    """The adapter on the aligner's model, or the blend of some, if it is one."""
    limit: int | None = None
    """Tokens of its prompt that may be read by now, if it draws nothing at this step; None if it draws."""


class _Seat:
    """What a slot holds: the first tokens of a request, as many as the slot's length says."""

    def __init__(self, ask: Ask) -> None:
        self.prompt, self.adapter = ask.request.prompt, ask.adapter
        self.owner = ask.request
        self.output: list[int] = []
        """What was read behind the prompt."""
        self.idle = 0
        """Steps since somebody sat here."""

    def suits(self, ask: Ask) -> bool:
        """Whether the request may go on from here, after somebody left."""
        same = self.owner.gone and self.prompt is ask.request.prompt and self.adapter == ask.adapter
        return same and list(ask.request.output[: len(self.output)]) == self.output

    def learn(self, request: Request, read: int) -> None:
        """So many tokens of the request are in the slot."""
        behind = max(read - len(request.prompt), 0)
        del self.output[behind:]
        self.output += request.output[len(self.output) : behind]


class AlignerCache:
    """Seats for the requests of one aligner's model. All memory is taken at the start.

    Args:
        model: the aligner, or the base that several adapters share.
        slots: the most requests at a step, counted once for each adapter that they use.
        capacity: the most tokens of a request.
        chunk: the most tokens in a pass that reads prompts.
        adapters: those on the model.
    """

    def __init__(self, model: HuggingFaceLM, slots: int, capacity: int, chunk: int, adapters: Sequence[Any] = ()) -> None:
        self.model, self._chunk = model, chunk
        self._state = model.new_state(slots, capacity)
        self._state.adapters = [adapters[slot % len(adapters)] if adapters else None for slot in range(slots)]
        self._seats: list[_Seat] = []
        """Seat i is slot i; slots after the last seat are empty."""
        model.extend(self._state, torch.zeros(slots, 1, dtype=torch.long), [1] * slots)  # allocates
        model.rollback(self._state, [1] * slots)
        for layer in self._state.layers:
            layer.keys.zero_()  # so that the memory is taken now, and not in flight
            layer.values.zero_()
        self._gathered = self._state.gathered  # where adapters stand side by side: kept for steps that mix them
        self._stacked = model.store.stack(adapters) if isinstance(model, AdapterPool) and blends(adapters) else None

    @property
    def num_bytes(self) -> int:
        """What all slots take, and their adapters side by side."""
        mixing = sum(part.num_bytes for part in (self._gathered, self._stacked) if part is not None)
        return mixing + self._state.num_bytes

    def rows(self, asks: Sequence[Ask]) -> Tensor:
        """Next-token rows `[n, V]` for those asks that draw, in their order.

        Args:
            asks: everyone who is in vLLM's batch at this step, drawing or not.
        """
        slots = self._seat(asks)
        self._read(asks, slots)
        drawing = [(ask.request, slot) for ask, slot in zip(asks, slots, strict=True) if ask.limit is None]
        if not drawing:
            return torch.empty(0, self.model.vocab_size, device=self.model.device)
        width = 1 + max(slot for _, slot in drawing)
        tokens, counts = [[0]] * width, [0] * width
        for request, slot in drawing:
            tokens[slot], counts[slot] = request.tokens(len(request) - 1, len(request)), 1
        blending = any(isinstance(adapter, Blend) for adapter in self._state.adapters)
        self._state.gathered = self._stacked if blending else self._gathered
        rows = self.model.extend(self._state, torch.tensor(tokens), counts)[:, 0]
        for request, slot in drawing:
            self._seats[slot].learn(request, len(request))
        order = [slot for _, slot in drawing]
        return rows if order == list(range(width)) else rows[torch.tensor(order, device=rows.device)]

    def _seat(self, asks: Sequence[Ask]) -> list[int]:
        """The slot of each ask; newcomers get the next free ones, so that they can be read together."""
        found = {(id(seat.owner), seat.adapter): seat for seat in self._seats if not seat.owner.gone}
        seats = []
        for ask in asks:
            key = id(ask.request), ask.adapter
            if key not in found and (seat := next((seat for seat in self._seats if seat.suits(ask)), None)):
                seat.owner, found[key] = ask.request, seat
            seats.append(found.get(key))
        for seat in self._seats:
            seat.idle = seat.idle + 1 if seat.owner.gone else 0
        missing = seats.count(None)
        self._clear(missing)
        for i, ask in enumerate(asks):
            if seats[i] is None:
                self._state.lengths[len(self._seats)], self._state.adapters[len(self._seats)] = 0, ask.adapter
                seats[i] = seat = _Seat(ask)
                self._seats.append(seat)
        place = {id(seat): slot for slot, seat in enumerate(self._seats)}
        return [place[id(seat)] for seat in seats]

    def _clear(self, wanted: int) -> None:
        """Give up seats that were empty for long, and as many more as are wanted, those empty longest first."""
        free = len(self._state) - len(self._seats)
        empty = sorted((seat for seat in self._seats if seat.owner.gone), key=lambda seat: -seat.idle)
        for seat in empty:
            if seat.idle <= PATIENCE and free >= wanted:
                return
            slot, last = self._seats.index(seat), len(self._seats) - 1
            if slot != last:
                self.model.copy(self._state, [last], self._state, [slot])
                self._seats[slot] = self._seats[last]
            self._seats.pop()
            free += 1

    def _read(self, asks: Sequence[Ask], slots: Sequence[int]) -> None:
        """Bring each seat to where its request stands: all but the last token if it draws, what is allowed if it does not."""
        pending: dict[int, list[int]] = {}
        for ask, slot in zip(asks, slots, strict=True):
            request, held = ask.request, self._state.lengths[slot]
            last = len(request) - 1 if ask.limit is None else min(ask.limit, len(request) - 1)
            if held > last and ask.limit is None:  # what was drawn last did not count
                self._state.lengths[slot] = last
                self._seats[slot].learn(request, last)
            elif held < last:
                pending[slot] = request.tokens(held, last)
                self._seats[slot].learn(request, last)
        for start, stop in _runs(sorted(pending), [seat.adapter for seat in self._seats]):
            self._read_run(start, stop, [pending[slot] for slot in range(start, stop)])

    def _read_run(self, start: int, stop: int, texts: list[list[int]]) -> None:
        """Read texts into neighbouring slots, in chunks."""
        if self.model.is_recurrent:  # a window would not know what its slots' states have read; the slots before take nothing
            start, texts = 0, [[] for _ in range(start)] + texts
        state = self._state if self.model.is_recurrent else self._state.window(start, stop)
        done, longest = 0, max(map(len, texts))
        while done < longest:
            width = min(longest - done, max(1, self._chunk // len(texts)))
            counts = [min(max(len(text) - done, 0), width) for text in texts]
            block = [(text[done : done + width] + [0] * width)[:width] for text in texts]
            self.model.prefill(state, torch.tensor(block), counts)
            done += width
        self._state.lengths[start:stop] = state.lengths[: stop - start]


def _runs(slots: Sequence[int], adapters: Sequence[Any]) -> list[tuple[int, int]]:
    """Ascending slots as half-open ranges without gaps, each of one adapter, which so need not be gathered."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot and adapters[slot] == adapters[slot - 1]:
            runs[-1] = runs[-1][0], slot + 1
        else:
            runs.append((slot, slot + 1))
    return runs
