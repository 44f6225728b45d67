"""Continuous batching: requests join and leave at any step, and nobody waits for anybody's end.

Each `step` is schedule → run → postprocess:

    schedule   waiting sequences are admitted in order while there is room, and begin to read their prompts
    run        one chunk of prompts is read, so that a long one does not hold up the rest; the pass that reads a prompt's last
               token gives the first one of its answer; then, if somebody was decoding before, every sequence that has read
               its prompt decodes for one draft-and-verify step (trimtab.decode.batch)
    postprocess  finished sequences leave at once, and their slots are free for the next step

Requests may have aligners of their own, or none: they share the proposal, and each pass of it. Completions of one request
share a prompt list; it is read once and copied. What is in the engine never changes what a request gets, only when.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trimtab.decode.batch import Batch
from trimtab.decode.draft import Models
from trimtab.decode.memory import Size, reading_bytes
from trimtab.decode.pace import Load, Pace
from trimtab.decode.prefill import Reading
from trimtab.decode.prefixes import Prefixes
from trimtab.decode.request import TokenEvent
from trimtab.decode.sequence import Sequence as Growing
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.models.base import LanguageModel, State

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

SPARE = 4
"""An idle cache with slots longer than so many times what is needed is made anew."""


class Engine:
    """Decodes sequences together.

    Args:
        proposal: P_M, which all sequences share.
        pace: chooses draft lengths; may be shared by engines over the same proposal.
        max_num_seqs: the most sequences admitted at once; others wait in the order they came.
        max_num_batched_tokens: the most prompt tokens read in one step.
        max_cache_tokens: the most tokens that the slots may hold together; None for what `max_num_seqs` sequences of any
            length need. A long request then means fewer at a time. Prompts that are being read are on top.
        max_cache_bytes: the most memory that all caches may take together: those of the proposal, of aligners and of drafters,
            prompts that are being read, and what is there twice while a cache grows. None for no limit.
        prefixes: what was read before, by this engine or another; None for an engine that keeps nothing.
        log_z_every: also observe each sequence's log Z, once in so many steps; 0 for never.
    """

    def __init__(
        self,
        proposal: LanguageModel,
        pace: Pace,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        max_cache_tokens: int | None = None,
        max_cache_bytes: int | None = None,
        prefixes: Prefixes | None = None,
        log_z_every: int = 0,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if value < 1:
                raise InvalidOption(f"{name} must be at least 1, not {value}")
        if max_num_seqs > (most := getattr(proposal, "max_slots", max_num_seqs)):
            raise InvalidOption(f"max_num_seqs must be at most {most} for this proposal, not {max_num_seqs}")
        self.pace = pace
        self._proposal, self._log_z_every = proposal, log_z_every
        self.max_num_seqs, self._max_tokens = max_num_seqs, max_num_batched_tokens
        self._cache_tokens, self._cache_bytes = max_cache_tokens, max_cache_bytes
        self.prefixes = prefixes or Prefixes(0)
        self._waiting: deque[Growing] = deque()
        self._reading: deque[Reading] = deque()
        self._batch = self._empty_batch()
        self._moving: list[Growing] = []
        """Sequences on their way from one of these to the next."""
        self._first: list[tuple[Growing, TokenEvent]] = []
        """Those whose prompts this step has read, and their first tokens."""
        self.failed: list[Growing] = []
        """Sequences that the last step lost to a failure of the machine, each with its `error`."""

    def __len__(self) -> int:
        """Sequences that are not finished."""
        return len(self._waiting) + self._admitted

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""
        return len(self._batch.sequences)

    @property
    def waiting(self) -> int:
        """Sequences that have not been admitted."""
        return len(self._waiting)

    @property
    def cache_usage(self) -> float:
        """The share of the cache that the sequences may come to use; of the cache there is, if it has no limit."""
        sequences, size = list(self._batch.sequences), self._batch.size
        if self._cache_bytes is not None:
            return sum(model.state_bytes(1, _need(s)) for s in sequences for model in s.models.all) / self._cache_bytes
        return sum(map(_need, sequences)) / max(self._cache_tokens or size.slots * size.capacity, 1)

    def submit(self, sequences: Iterable[Growing]) -> None:
        """Queue sequences.

        Raises:
            InvalidRequest: one of them can never be admitted; none is queued then.
        """
        new = list(sequences)
        for sequence in new:
            need = _need(sequence)
            if self._cache_tokens is not None and need > self._cache_tokens:
                raise InvalidRequest(
                    f"prompt and max_tokens need {need} tokens, but the cache holds {self._cache_tokens}: ask for fewer"
                )
            if self._cache_bytes is None:
                continue
            alone = self._empty_batch().most_bytes(Size(1, need), [sequence]) + reading_bytes([sequence])
            if alone > self._cache_bytes:
                sizes = f"{alone / 2**20:.1f} MiB of caches, but {self._cache_bytes / 2**20:.1f} MiB are allowed"
                raise InvalidRequest(f"prompt and max_tokens, {need} tokens, need {sizes}: ask for fewer")
        self._waiting.extend(new)

    def run(self, sequences: Iterable[Growing]) -> Iterator[TokenEvent]:
        """Decode sequences to their end, with whatever else is here; closing the iterator stops the work.

        Raises:
            InvalidRequest: as `submit`.
            Exception: what a sequence was lost to.
        """
        for events in self.steps(sequences):
            yield from events

    def steps(self, sequences: Iterable[Growing]) -> Iterator[list[TokenEvent]]:
        """As `run`, with the events of each step together."""
        self.submit(sequences)
        while self:
            yield self.step()
            if self.failed and self.failed[0].error is not None:
                raise self.failed[0].error

    @torch.inference_mode()
    def cancel(self, sequences: Iterable[Growing]) -> None:
        """Drop sequences, wherever they are; their slots are free at the next step."""
        gone = set(sequences)
        self._waiting = deque(s for s in self._waiting if s not in gone)
        for reading in self._reading:
            reading.drop(gone)
        self._reading = deque(reading for reading in self._reading if len(reading))
        self._let_go([s for s in self._batch.sequences if s in gone])

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Read some of the prompts; at least one token for each sequence that has read its own.

        A sequence without a next token ends with the `finish_reason` `"error"`, and nobody else notices. If the machine fails
        (memory, say) while newcomers are admitted or read, they are in `failed`, and those that decode go on. Otherwise all
        that were at work are, and the error is raised; those that wait can go on.
        """
        self.failed = []
        decoding: list[Growing] = []
        try:
            ongoing = bool(self._batch.sequences)
            self._take_in()
            decoding = list(self._batch.sequences)
            events = [event for _, event in self._first]
            if decoding and (ongoing or not events):  # or first tokens would wait for second ones
                events += self._decode()
            self._let_go([s for s in decoding if s.finish_reason])
            self._first = []
        except Exception as error:
            reading = [s for reading in self._reading for s in reading.sequences]
            begun = [sequence for sequence, _ in self._first]
            lost = [*self.failed, *decoding, *self._batch.sequences, *begun, *reading, *self._moving]
            self.failed = list(dict.fromkeys(lost))
            for sequence in self.failed:
                sequence.error = sequence.error or error
            self._reading.clear()
            self._moving, self._first = [], []
            self._batch = self._empty_batch()
            raise
        return events

    def _take_in(self) -> None:
        """Admit and read. Where nobody decodes whom a failure would spare, it is raised."""
        try:
            self._admit()
            self._read()
        except Exception as error:
            begun = {sequence for sequence, _ in self._first}
            reading = [s for reading in self._reading for s in reading.sequences]
            newcomers = [s for s in dict.fromkeys([*self._moving, *reading]) if s not in begun]
            if not self._first and set(self._batch.sequences) <= set(newcomers):
                raise
            logger.exception("%d sequences could not be taken in", len(newcomers))
            for sequence in newcomers:
                sequence.error = error
            self._moving = []
            self._reading.clear()
            self._batch.remove([s for s in self._batch.sequences if s in newcomers])
            self.failed = newcomers

    def _empty_batch(self) -> Batch:
        return Batch(self._proposal, self.pace, log_z_every=self._log_z_every)

    @property
    def _admitted(self) -> int:
        return self.running + sum(len(reading) for reading in list(self._reading))  # a copy: another thread may look

    def _admit(self) -> None:
        """Let waiting sequences in, in their order, while slots and cache have room."""
        live = [*self._batch.sequences, *(s for reading in self._reading for s in reading.sequences)]
        new: list[Growing] = []
        size = None
        while self._waiting and len(live) + len(new) < self.max_num_seqs:
            fits = self._size_for(live, [*new, self._waiting[0]])
            if fits is None:
                if self._cache_bytes is not None and self.prefixes.drop_oldest():  # before anybody waits for memory
                    continue
                break
            new.append(self._waiting.popleft())
            size = fits
        if size is None:
            return
        self._moving = new
        if size != self._batch.size:
            self._batch.resize(*size)
        decoding = {id(s.prompt): s for s in self._batch.sequences if s.has_aligners}
        begin: dict[Models, list[Growing]] = {}
        for sequence in new:
            if sibling := decoding.get(id(sequence.prompt)):
                self._batch.add_sibling(sequence, sibling)
            elif not any(reading.join(sequence) for reading in self._reading):
                begin.setdefault(sequence.models, []).append(sequence)
        self._reading.extend(Reading(models, members, self.prefixes) for models, members in begin.items())
        self._moving = []

    def _size_for(self, live: Sequence[Growing], new: Sequence[Growing]) -> Size | None:
        """What the cache is to be for these sequences; None if there is no room for them.

        It grows by more than is needed, so that growing is rare, where the limits allow it.
        """
        needed = Size(len(live) + len(new), max(map(_need, [*live, *new])))
        have = self._batch.size
        idle = not self._batch.sequences
        if idle and SPARE * needed.capacity < have.capacity:  # what a long request needed is not kept for good
            have = Size()
        roomy = Size(
            have.slots if needed.slots <= have.slots else min(max(needed.slots, 2 * have.slots), self.max_num_seqs),
            have.capacity if needed.capacity <= have.capacity else max(needed.capacity, have.capacity * 3 // 2),
        )
        return next((size for size in (roomy, needed) if self._allows(size, live, new)), None)

    def _allows(self, size: Size, live: Sequence[Growing], new: Sequence[Growing]) -> bool:
        """Whether a cache of this size stays within the limits, with all that is beside it until the new ones have read."""
        if self._cache_tokens is not None and size.slots * size.capacity > self._cache_tokens:
            return False
        if self._cache_bytes is None:
            return True
        prompts = {id(sequence.prompt) for sequence in live if sequence.has_aligners}
        reading = [sequence for reading in self._reading for sequence in reading.sequences]
        begin = [sequence for sequence in new if id(sequence.prompt) not in prompts]
        beside = sum(reading.num_bytes for reading in self._reading) + reading_bytes(begin)
        return self._batch.most_bytes(size, [*reading, *new]) + beside + self.prefixes.num_bytes <= self._cache_bytes

    def _read(self) -> None:
        """Read chunks of prompts, of those first that have waited longest since their last, until the budget is spent."""
        budget = self._max_tokens
        through: list[_Through] = []
        try:
            for reading in list(self._reading):
                if budget <= 0:
                    break
                read, slots, rows = reading.step(budget)
                budget -= read
                if slots:
                    through.append((reading, slots, rows))
                    self._moving += slots
                self._reading.rotate(-1)
        finally:  # who has read its prompt does not share what befalls the others
            if through:
                self._begin(through)
        self._reading = deque(reading for reading in self._reading if len(reading))  # not before: what they hold counts

    def _begin(self, through: Sequence["_Through"]) -> None:
        """Decide first tokens, and let those who go on decode."""
        first = self._batch.begin([(reading.models, list(slots), rows) for reading, slots, rows in through])
        for (reading, slots, _), events in zip(through, first, strict=True):
            begun = list(zip(slots, events, strict=True))
            self._first += [one for one in begun if one[0].finish_reason]
            for sequence, _ in begun:
                if sequence.finish_reason:
                    self._keep(sequence, [(state, slots[sequence]) for state in reading.states])
            if going := [sequence for sequence in slots if not sequence.finish_reason]:
                self._batch.add(reading.models, going, reading.states, [slots[sequence] for sequence in going])
            self._first += [one for one in begun if not one[0].finish_reason]
            self._moving = [sequence for sequence in self._moving if sequence not in slots]

    def _let_go(self, gone: Sequence[Growing]) -> None:
        """Take sequences out of the batch, and keep what they have read."""
        for sequence in gone:
            self._keep(sequence, self._batch.parts(sequence))
        self._batch.remove(gone)

    def _keep(self, sequence: Growing, parts: Sequence[tuple[State, int]]) -> None:
        """Keep what was read of a sequence, where it went well; of several completions of a prompt, of the first one's.

        Of one that leaves its aligners, that is what they have read, too: what comes behind it only a bare request could use.
        """
        if sequence.error is None and sequence.index == 0 and sequence.has_aligners:
            self.prefixes.keep(sequence, parts, self._spare_bytes)

    @property
    def _spare_bytes(self) -> int | None:
        """What the limit leaves for prefixes beside the sequences that are here; None without a limit."""
        if self._cache_bytes is None:
            return None
        coming = [sequence for reading in self._reading for sequence in reading.sequences]
        live = sum(reading.num_bytes for reading in self._reading)
        if coming or self._batch.sequences:
            live += self._batch.most_bytes(self._batch.size, coming)
        else:  # an idle one goes on holding what it had
            live += self._proposal.state_bytes(*self._batch.size)
        return self._cache_bytes - live

    def _decode(self) -> list[TokenEvent]:
        sequences = self._batch.sequences
        drafting = [s for s in sequences if s.can_draft]
        load = Load(len(sequences), len(drafting), self._batch.groups)
        longest = self.pace.longest(load)
        chances = [s.chances(self.pace.kind(s.kind), longest) for s in drafting]
        wanted = self.pace.choose(load, chances)
        limits = [s.drafts(wanted) for s in sequences]
        started = time.perf_counter()
        events = self._batch.step(limits)
        self.pace.observe(load, max(limits), time.perf_counter() - started)
        if leaving := [sequence for sequence in sequences if sequence.leaves]:
            for sequence in leaving:
                self._keep(sequence, self._batch.parts(sequence))
            self._batch.part(leaving)
        return events


_Through = tuple[Reading, dict[Growing, int], list[Tensor | None]]
"""Who has read a prompt: the reading, the slot of each sequence, and all models' rows `[b, 1, V]` for them."""


def _need(sequence: Growing) -> int:
    """Tokens that a sequence may come to hold."""
    return len(sequence.prompt) + sequence.limit
