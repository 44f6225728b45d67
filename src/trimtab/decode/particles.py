"""Draw whole sequences at the sequence level: populations of particles that grow together, are weighed, and drawn anew.

    read     each prompt is read once, by way of the cache of prefixes, and copied for every particle
    weigh    the aligned rows of all particles that go on, and log Z of each; a token for each, as if nothing happened between
    settle   on the host: Z goes into the weights; where they have become too uneven, particles are drawn anew: those that die
             become copies of those that are wanted more than once, slots included, and tokens are drawn again
    extend   all models read the new tokens in one pass; who has ended gives up its slots and keeps its weight

One transfer to the host a step, as in the engine, and one more where particles were drawn anew. The noise of a run is keyed by
the request's seed and the completion's index: at each position one uniform for resampling, then one for each particle's token.
"""

import dataclasses
import logging
import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN, inverse_cdf
from trimtab.core.noise import uniforms
from trimtab.core.particles import choose, effective_size, estimate_log_z, even_weights, resample, reweigh
from trimtab.core.transfer import to_device
from trimtab.decode.draft import Models
from trimtab.decode.drafters import NoDrafter
from trimtab.decode.outcome import Drawn
from trimtab.decode.prefill import CHUNK, Reading
from trimtab.decode.prefixes import Prefixes
from trimtab.decode.reading import extend_proposal, input_of, taps_of
from trimtab.decode.request import Completion, Particles
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.sequence_level import SequenceLevel, check_sequence_level
from trimtab.decode.shaping import BatchShaping, explain_dead_row
from trimtab.errors import DeadRow, InvalidRequest
from trimtab.models.base import vacate

__all__ = ["sample_sequences"]

logger = logging.getLogger(__name__)

NOISE_BLOCK = 64
"""Positions for which noise is drawn at once."""


@torch.inference_mode()
def sample_sequences(
    sequences: Sequence[Growing], how: SequenceLevel, prefixes: Prefixes, max_num_seqs: int
) -> list[Completion]:
    """Complete requests of the same models at the sequence level, each by a run of its own.

    A completion whose particles all come to places without a token, or to a row that is NaN, has the `finish_reason` `"error"`.

    Args:
        sequences: the completions to make, without tokens.
        how: how many particles each run has, and when they are resampled.
        prefixes: what was read before.
        max_num_seqs: the most particles that are decoded at once, if that is at least one run.

    Raises:
        InvalidRequest: a request cannot be sampled so; nothing has been computed then.
    """
    most = max(max_num_seqs, how.particles)
    for sequence in sequences:
        check_sequence_level(sequence.params, sequence.shaping)
        most = min(most, getattr(sequence.models.proposal, "max_slots", most))
    if how.particles > most:
        raise InvalidRequest(f"sequence_level: this proposal holds at most {most} texts at once: use particles={most}")
    at_once = most // how.particles
    done = []
    for start in range(0, len(sequences), at_once):
        done += _Runs(sequences[start : start + at_once], how, prefixes).finish()
    _warn(done, how)
    return done


class _Runs:
    """Runs that grow together. Particle i of run r is number r·N + i; those that go on occupy the first slots of every state.

    Args:
        sequences: one for each run.
        how, prefixes: as for `sample_sequences`.
    """

    def __init__(self, sequences: Sequence[Growing], how: SequenceLevel, prefixes: Prefixes) -> None:
        self._sequences, self._how, self._prefixes = sequences, how, prefixes
        self._models = _without_drafter(sequences[0].models)
        for sequence in sequences:
            sequence.models = self._models
        self._device, self._taps = self._models.proposal.device, taps_of(self._models.aligners)
        self._particles = [sequence.fork() for sequence in sequences for _ in range(how.particles)]
        self._done: dict[int, Completion] = {}
        self._origins = list(range(len(self._particles)))
        self._slots: list[int] = []
        """The particle in each slot."""
        capacity = max(len(sequence.prompt) + sequence.limit for sequence in sequences)
        self._states = [model.new_state(len(self._particles), capacity) for model in self._models.all]
        self._weights = even_weights(len(sequences), how.particles)
        self._sizes: list[list[float]] = [[] for _ in sequences]
        self._resampled: list[list[int]] = [[] for _ in sequences]
        self._broken: dict[int, DeadRow] = {}
        """Why a run cannot go on."""
        self._position = 0
        self._noise = torch.empty(0)
        self._shaping: tuple[list[int], BatchShaping] | None = None

    def finish(self) -> list[Completion]:
        """One completion for each run."""
        rows = self._read()
        while self._slots:
            self._step(rows)
            if self._slots:
                rows = self._extend()
        return self._draw_completions()

    def _read(self) -> list[Tensor]:
        """Read the prompts, copy each for its particles, and return all models' rows `[b, 1, V]` after them."""
        reading = Reading(self._models, self._sequences, self._prefixes)
        count, parts = self._how.particles, []
        while len(reading):
            _, slots, rows = reading.step(CHUNK)
            if not slots:
                continue
            ready = [run * count + i for run, s in enumerate(self._sequences) if s in slots for i in range(count)]
            order = {sequence: i for i, sequence in enumerate(slots)}
            owners = [self._sequences[particle // count] for particle in ready]
            places = range(len(self._slots), len(self._slots) + len(ready))
            for model, source, state in zip(self._models.all, reading.states, self._states, strict=True):
                model.copy(source, [slots[owner] for owner in owners], state, places)
            self._slots += ready
            index = to_device([order[owner] for owner in owners], self._device)
            parts.append(self._filled([None if row is None else row[index] for row in rows], ready))
            for sequence in slots:
                if sequence.index == 0:
                    self._prefixes.keep(sequence, [(state, slots[sequence]) for state in reading.states])
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    def _extend(self) -> list[Tensor]:
        """Let all models read the newest tokens; their rows `[b, 1, V]`."""
        tokens = to_device([[self._particles[particle].next_input] for particle in self._slots], self._device)
        counts = [1] * len(self._slots)
        proposal, *states = self._states
        wanted = any(sequence.reads_proposal for sequence in self._sequences)
        logp, tapped = extend_proposal(self._models.proposal, proposal, tokens, counts, self._taps, wanted=wanted)
        rest = [
            model.extend(state, input_of(model, tokens, tapped), counts).to(self._device)
            for model, state in zip(self._models.aligners, states, strict=True)
        ]
        return self._filled([logp, *rest], self._slots)

    def _filled(self, rows: Sequence[Tensor | None], particles: Sequence[int]) -> list[Tensor]:
        """All models' rows `[b, 1, V]` of some particles, with even ones for those of the proposal that nobody reads."""
        logp, logqs = rows[0], [row for row in rows[1:] if row is not None]
        reads = [self._sequences[particle // self._how.particles].reads_proposal for particle in particles]
        if logp is not None and all(reads):
            return [logp, *logqs]
        even = logqs[0].new_full((), -math.log(logqs[0].shape[-1])).expand_as(logqs[0])
        return [even if logp is None else torch.where(to_device(reads, self._device)[:, None, None], logp, even), *logqs]

    def _step(self, rows: Sequence[Tensor]) -> None:
        """One token for every particle that goes on, from all models' rows `[b, 1, V]`."""
        aligned, log_z = self._lay_out().weigh(self._lay_out().inputs(rows[0], rows[1:]))
        noise = self._next_noise()
        tokens = self._draw(aligned, self._slots, noise)
        numbers = torch.cat([log_z[:, 0].double(), tokens.double()]).tolist()
        found, drawn = numbers[: len(self._slots)], numbers[len(self._slots) :]
        for slot in (slot for slot, value in enumerate(found) if math.isnan(value)):
            self._break(slot, rows)
        increments = torch.zeros(len(self._particles), dtype=torch.float64)
        increments[self._slots] = torch.tensor(found, dtype=torch.float64).nan_to_num(neginf=-math.inf)
        parents = self._settle(increments, noise[:, 0])
        if parents is not None:
            rows_of = to_device(parents, self._device, torch.long)
            drawn = self._draw(aligned[rows_of], self._slots, noise).tolist()
        self._accept([int(token) for token in drawn])
        self._position += 1

    def _settle(self, increments: Tensor, uniform: Tensor) -> list[int] | None:
        """Weigh the particles, and draw them anew where it is time; then see `_move`, otherwise None.

        Args:
            increments: log Z of each, 0 for those that have ended.
            uniform: `[R]` one for each run.
        """
        weights = reweigh(self._weights, increments.view_as(self._weights.logw))
        sizes = effective_size(weights.logw).tolist()
        for run in {particle // self._how.particles for particle in self._slots}:
            self._sizes[run].append(sizes[run])
        self._weights, ancestors, happened = resample(weights, uniform, self._how.ess)
        for run in happened.nonzero()[:, 0].tolist():
            self._resampled[run].append(self._position)
        first = torch.arange(len(self._sequences))[:, None] * self._how.particles
        parent_of = (ancestors + first).flatten().tolist()
        moved = [(child, parent) for child, parent in enumerate(parent_of) if child != parent]
        return self._move(moved) if moved else None

    def _move(self, moved: Sequence[tuple[int, int]]) -> list[int]:
        """Let particles become copies of others; for each slot, which one held before what it holds now.

        Args:
            moved: who becomes a copy of whom; nobody is in both places.
        """
        slot_of = {particle: slot for slot, particle in enumerate(self._slots)}
        parents, copies, gone = list(range(len(self._slots))), [], []
        for child, parent in moved:
            self._origins[child] = self._origins[parent]
            self._done.pop(child, None)
            if parent in self._done:
                self._done[child] = self._done[parent]
                gone += [child] if child in slot_of else []
                continue
            self._particles[child] = self._particles[parent].fork()
            if child not in slot_of:
                slot_of[child] = len(self._slots)
                self._slots.append(child)
                parents.append(0)
            copies.append((slot_of[parent], slot_of[child]))
            parents[slot_of[child]] = slot_of[parent]
        if copies:
            for model, state in zip(self._models.all, self._states, strict=True):
                model.copy(state, [source for source, _ in copies], state, [slot for _, slot in copies])
        for slot in self._leave(gone):
            parents[slot] = parents[-1]
            parents.pop()
        return parents

    def _accept(self, tokens: Sequence[int]) -> None:
        """Give each particle that goes on its token, and let those go that have ended."""
        gone = []
        for particle, token in zip(self._slots, tokens, strict=True):
            growing, broken = self._particles[particle], self._broken.get(particle // self._how.particles)
            if broken is not None or token == NO_TOKEN:
                where = f"after {len(growing.tokens)} tokens: the models' rows share none there"
                event = growing.fail(broken or DeadRow(f"rule '{growing.shaping.rule}' leaves no possible token {where}"))
            else:
                event = growing.accept(Drawn(token))
            if event.completion is not None:
                self._done[particle] = event.completion
                gone.append(particle)
        self._leave(gone)

    def _leave(self, gone: Sequence[int]) -> list[int]:
        """Empty the slots of particles, in the order in which the last ones move into them: those."""
        slot_of = {particle: slot for slot, particle in enumerate(self._slots)}
        slots = sorted((slot_of[particle] for particle in gone), reverse=True)
        for slot in slots:
            for model, state in zip(self._models.all, self._states, strict=True):
                if self._particles[self._slots[slot]].error:
                    state.wipe(slot)
                vacate(model, state, slot, len(self._slots) - 1)
            self._slots[slot] = self._slots[-1]
            self._slots.pop()
        return slots

    def _lay_out(self) -> BatchShaping:
        """What the particles in the slots want of their rows."""
        runs = [particle // self._how.particles for particle in self._slots]
        if self._shaping is None or self._shaping[0] != runs:
            alone = not any(self._sequences[run].reads_proposal for run in runs)
            self._shaping = runs, BatchShaping([self._sequences[run].shaping for run in runs], self._device, alone=alone)
        return self._shaping[1]

    def _next_noise(self) -> Tensor:
        """Uniforms `[R, 1 + N]` for this position, on the host."""
        within = self._position % NOISE_BLOCK
        if not within:
            seeds, indices = [s.seed for s in self._sequences], [s.index for s in self._sequences]
            starts = [self._position] * len(self._sequences)
            ahead = min(NOISE_BLOCK, max(sequence.limit for sequence in self._sequences) - self._position)
            self._noise = uniforms(seeds, indices, starts, ahead, 1 + self._how.particles)
        return self._noise[:, within]

    def _draw(self, aligned: Tensor, particles: Sequence[int], noise: Tensor) -> Tensor:
        """A token `[b]` for each of some particles, from their rows `[b, 1, V]` and the uniforms of all."""
        own = to_device(noise[:, 1:].flatten()[list(particles)], self._device)
        return inverse_cdf(aligned[:, 0], own[:, None])[:, 0]

    def _break(self, slot: int, rows: Sequence[Tensor]) -> None:
        """Note that a run cannot go on, for a row of one of its particles is NaN."""
        run = self._slots[slot] // self._how.particles
        mine = [row[slot, 0] for row in rows]
        self._broken.setdefault(run, explain_dead_row(self._sequences[run].shaping, mine, f"after {self._position} tokens"))

    def _draw_completions(self) -> list[Completion]:
        """The completion of each run, drawn by the weights of its particles, with all of them."""
        seeds, indices = [s.seed for s in self._sequences], [s.index for s in self._sequences]
        uniform = uniforms(seeds, indices, [len(sizes) for sizes in self._sizes], 1, 1)[:, 0, 0]
        logw = self._weights.logw
        columns = choose(logw, uniform), logw.softmax(-1), estimate_log_z(self._weights), effective_size(logw)
        found = zip(*(column.tolist() for column in columns), strict=True)
        return [self._completion(run, *numbers) for run, numbers in enumerate(found)]

    def _completion(self, run: int, chosen: int, weights: list[float], log_z: float, size: float) -> Completion:
        """That of a run whose particle `chosen` was drawn; `NO_TOKEN` if none counts."""
        first = run * self._how.particles
        done = [self._done[particle] for particle in range(first, first + self._how.particles)]
        if run in self._broken or chosen == NO_TOKEN:
            return next(one for one in done if one.error)
        origins = {self._origins[first + i] for i, weight in enumerate(weights) if weight}
        told = self._sizes[run], self._resampled[run], len(origins)
        return dataclasses.replace(done[chosen], particles=Particles(done, weights, log_z, size, *told))


def _without_drafter(models: Models) -> Models:
    """Proposal and aligners; nobody drafts for particles."""
    count = 1 + len(models.aligners)
    return dataclasses.replace(models, drafter=NoDrafter(), adapters=models.adapters[:count])


def _warn(completions: Sequence[Completion], how: SequenceLevel) -> None:
    """Say where one particle is as good as all that a run has left, with the figures."""
    sets = [completion.particles for completion in completions if completion.particles is not None]
    poor = [particles for particles in sets if particles.collapsed]
    if not poor:
        return
    size = statistics.median(particles.least_size for particles in poor)
    origins = statistics.median(particles.origins for particles in poor)
    logger.warning(
        "sequence level: the weights have collapsed in %d of %d runs: %d particles were once worth %.1f, and in the end descend"
        " from %g of those that began (medians). Such texts follow neither law well: take more particles, fewer max_tokens or a"
        " smaller weight",
        *(len(poor), len(sets), how.particles, size, origins),
    )
