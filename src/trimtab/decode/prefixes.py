"""Prefixes that are not read twice: what finished requests have read, for those whose prompts begin alike.

A request that is over leaves the keys and values of its text behind, prompt and answer. A later prompt takes over as many of
its tokens as it begins with, and the rest is read: the second turn of a chat, or whatever stands behind one system prompt. The
rows are those of a prompt that was read in two pieces, which the models' contract has equal to those of one.

States belong to models and adapters, so only requests of the same ones share. Models whose weights may change are left out,
and nothing here keeps a model or an adapter alive.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from trimtab.decode.draft import Models
from trimtab.decode.sequence import Sequence as Growing
from trimtab.errors import InvalidOption
from trimtab.models.base import State, is_immutable

__all__ = ["PREFIX_CACHE_TOKENS", "Prefixes"]

logger = logging.getLogger(__name__)

PREFIX_CACHE_TOKENS = 8192
"""Tokens that are kept unless something else is said."""

WORTHWHILE = 16
"""Tokens; reading fewer costs little more than taking them over."""


FAILURES = (MemoryError, RuntimeError)
"""What a lack of memory raises."""


class Prefixes:
    """What is kept, the least recently used first.

    Args:
        max_tokens: the most tokens to keep; 0 keeps nothing.

    Raises:
        InvalidOption: `max_tokens` is no integer of at least 0.
    """

    def __init__(self, max_tokens: int = PREFIX_CACHE_TOKENS) -> None:
        if type(max_tokens) is not int or max_tokens < 0:
            raise InvalidOption(f"prefix_cache_tokens must be an integer of at least 0, not {max_tokens!r}")
        self.max_tokens = max_tokens
        self._kept: list[_Kept] = []

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(len(kept.ids) for kept in self._alive())

    @property
    def num_bytes(self) -> int:
        """What they take in memory, and one of them once more, for it is copied on its way to a request."""
        sizes = [kept.num_bytes for kept in self._alive()]
        return sum(sizes) + max(sizes, default=0)

    def drop_oldest(self) -> bool:
        """Forget what was used least recently; False if nothing is kept."""
        kept = self._alive()
        self._kept = kept[1:]
        return bool(kept)

    def take(self, sequence: Growing, states: Sequence[State], slot: int) -> int:
        """Copy the tokens that its prompt shares with what is kept, but for its last one, into an empty slot.

        Args:
            sequence: whose prompt is about to be read.
            states: one for each of its models.
            slot: of those states.

        Returns:
            How many tokens the slot has then. If memory ends on the way, none, and nothing is kept any more.
        """
        try:
            return self._take(sequence, states, slot)
        except FAILURES:
            logger.exception("a prefix could not be taken over; it is read instead, and those that were kept are dropped")
            for model, state in zip(sequence.models.all, states, strict=True):
                model.rollback(state, [0] * slot + [state.lengths[slot]])
            self._kept = []
            return 0

    def keep(self, sequence: Growing, parts: Sequence[tuple[State, int]], max_bytes: int | None = None) -> None:
        """Copy what its models have read of a sequence, unless nearly all of that is here already.

        If memory ends on the way, nothing is kept any more.

        Args:
            sequence: that is about to go.
            parts: the state of each of its models, and its slot there.
            max_bytes: the most memory for all that is kept; what is older goes first. None for no limit.
        """
        try:
            self._keep(sequence, parts, max_bytes)
        except FAILURES:  # what may come of use later is no reason to lose what is here
            logger.exception("a prefix could not be kept; those that were are dropped")
            self._kept = []

    def _take(self, sequence: Growing, states: Sequence[State], slot: int) -> int:
        best, count = None, 0
        for kept in reversed(self._alive()):  # of equals the newest
            if kept.ids[: count + 1] == sequence.prompt[: count + 1] and kept.serves(sequence):
                best, count = kept, _shared(kept.ids, sequence.prompt, count)
        count = min(count, len(sequence.prompt) - 1)  # somebody has to say the row after the last token
        if best is not None:
            count = min(state.known(0, count) for state in best.states)  # recurrent states forget little
        if best is None or count < WORTHWHILE:
            return 0
        self._use(best)
        models = sequence.models
        for model, adapter, kept_state, state in zip(models.all, _adapters(models), best.states, states, strict=True):
            part = model.select(kept_state, [0])
            model.rollback(part, [len(best.ids) - count])
            model.copy(part, [0], state, [slot])
            state.adapters[slot] = adapter
        return count

    def _keep(self, sequence: Growing, parts: Sequence[tuple[State, int]], max_bytes: int | None) -> None:
        models = sequence.models
        length = min(state.lengths[slot] for state, slot in parts)  # a drafter may be behind; a stop cuts what was read
        ids = [*sequence.prompt, *sequence.tokens][:length]
        if not WORTHWHILE <= len(ids) <= self.max_tokens or not all(map(is_immutable, models.all)):
            return
        here = self._alive()
        for kept in here:
            if kept.serves(sequence) and _shared(kept.ids, ids) > len(ids) - WORTHWHILE:
                self._use(kept)
                return
        self._kept = [kept for kept in here if not (kept.is_no_better(sequence) and ids[: len(kept.ids)] == kept.ids)]
        while self.num_tokens + len(ids) > self.max_tokens:
            self.drop_oldest()
        if max_bytes is not None:
            own = sum(model.state_bytes(1, state.lengths[slot]) for model, (state, slot) in zip(models.all, parts, strict=True))
            while self.num_bytes + 2 * own > max_bytes:
                if not self.drop_oldest():
                    return
        self._kept.append(_Kept(sequence, ids, parts))

    def _alive(self) -> list["_Kept"]:
        """What somebody may still come for; the rest is forgotten, with its memory."""
        self._kept = [kept for kept in self._kept if kept.is_alive]
        return self._kept

    def _use(self, used: "_Kept") -> None:
        self._kept = [*(kept for kept in self._kept if kept is not used), used]


class _Kept:
    """One text, as the models of a request have read it."""

    def __init__(self, sequence: Growing, ids: list[int], parts: Sequence[tuple[State, int]]) -> None:
        models = sequence.models
        self.ids = ids
        self.states: list[State] = []
        self._reads_proposal = sequence.reads_proposal
        self._models = [weakref.ref(model) for model in models.all]
        self._adapters = [None if adapter is None else weakref.ref(adapter) for adapter in _adapters(models)]
        for model, (state, slot) in zip(models.all, parts, strict=True):
            own = model.new_state(1, state.lengths[slot])
            model.copy(state, [slot], own, [0])
            model.rollback(own, [state.lengths[slot] - len(ids)])
            own.adapters = [None]  # or it would stay as long as this
            self.states.append(own)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory, as its models say."""
        models = [reference() for reference in self._models]
        return sum(m.state_bytes(1, s.capacity) for m, s in zip(models, self.states, strict=True) if m is not None)

    @property
    def is_alive(self) -> bool:
        """Whether somebody may still come for it."""
        return all(reference is None or reference() is not None for reference in [*self._models, *self._adapters])

    def serves(self, sequence: Growing) -> bool:
        """Whether it is what this sequence's models would make of these tokens."""
        return self._is_of(sequence) and self._reads_proposal >= sequence.reads_proposal

    def is_no_better(self, sequence: Growing) -> bool:
        """Whether all that it serves, the same text of this sequence would."""
        return self._is_of(sequence) and self._reads_proposal <= sequence.reads_proposal

    def _is_of(self, sequence: Growing) -> bool:
        """Whether its models and adapters are those of a sequence."""
        models = sequence.models
        wanted, had = [*models.all, *_adapters(models)], [*self._models, *self._adapters]
        return len(wanted) == len(had) and all(
            one is None if reference is None else one is not None and reference() is one
            for one, reference in zip(wanted, had, strict=True)
        )


def _adapters(models: Models) -> Sequence[Any]:
    """One for each of the models; None for a model as it is."""
    return models.adapters or [None] * len(models.all)


def _shared(first: Sequence[int], second: Sequence[int], known: int = 0) -> int:
    """With how many equal tokens both begin, of which so many are known to be."""
    pairs = enumerate(zip(first[known:], second[known:], strict=False), start=known)
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
