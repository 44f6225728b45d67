"""Draft and verify for the sequences that share their models. A draft length of 0 is decoding token by token.

    begin    the first token comes out of the pass that reads the prompt
    draft    the drafter reads what it has not read, then its own drafts one by one; each is drawn from its row
    verify   the other models read the newest token and all drafts in one pass; the rule makes the target rows; every position
             is decided by its coupled draw (trimtab.core.speculation)
    emit     what was decided goes to the sequences; what was not accepted is rolled back

Everything here but the last stays on the device. The proposal belongs to the whole batch (trimtab.decode.batch), whose other
sequences may have other aligners; this is what they have each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.core.noise import uniforms
from trimtab.core.speculation import DRAWS, Verdict, draft_tokens, verify, verify_greedy
from trimtab.core.transfer import to_device
from trimtab.decode.draft import Lookup, Models
from trimtab.decode.history import Histories
from trimtab.decode.memory import Size
from trimtab.decode.pace import Pace
from trimtab.decode.prefill import pad
from trimtab.decode.reading import input_of
from trimtab.decode.request import TokenEvent
from trimtab.decode.sampler import Sampler
from trimtab.decode.sequence import Drawn
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.shaping import BatchShaping, explain_dead_row
from trimtab.errors import DeadRow
from trimtab.models.base import LanguageModel, State, last_of, vacate

__all__ = ["Drafts", "Group", "can_draft"]

NOISE_BLOCK = 64
"""Positions for which noise is drawn at once."""


class Drafts:
    """What a group proposes to verify in one step.

    Attributes:
        tokens: `[b, P]` what the models read: the newest token of each sequence, then its drafts, but for the bonus position's.
        drafts: `[b, P]` one for each position, or `[b, P − 1]`, none for the bonus position; None where nobody drafts.
        drawn_from: the rows `[b, P, V]` they were drawn from, if there are any and not all are the best ones.
        read: rows of models that have read `tokens` already, by their place in `Models.all`.
    """

    def __init__(
        self,
        newest: Tensor,
        drafts: Tensor | None = None,
        drawn_from: Tensor | None = None,
        read: dict[int, Tensor] | None = None,
        *,
        bonus: bool = True,
    ) -> None:
        self.tokens = newest if drafts is None else torch.cat([newest, drafts[:, : -1 if bonus else None].clamp(min=0)], dim=1)
        self.drafts, self.drawn_from, self.read = drafts, drawn_from, read or {}


class Group:
    """Sequences with the same models. Sequence j is in slot j of a state for each of them but the proposal.

    Args:
        models: what they are decoded with.
        pace: told what became of drafts.
        log_z_every: also observe log Z, once in so many steps, for rules that have one; 0 for never.
        steps: how many steps like its own were made before.
    """

    def __init__(self, models: Models, pace: Pace, *, log_z_every: int, steps: int = 0) -> None:
        self.models = models
        self.sequences: list[Growing] = []
        self._pace, self._log_z_every, self._steps = pace, log_z_every if models.aligners else 0, steps
        self._states = [model.new_state(0, 0) for model in models.all[1:]]
        self._settings: _Settings | None = None
        self._bonus = True
        """Whether this step has drafts for bonus positions.

        A coupled draw needs their rows. Best tokens do not; but where nothing else is drafted, they tell whether it would pay.
        """
        self._rows: list[Tensor] = []

    @property
    def size(self) -> Size:
        """Of each of the states."""
        return Size(len(self._states[0]), self._states[0].capacity) if self._states else Size()

    def make_room(self, slots: int, capacity: int, most: int) -> None:
        """Move to larger states, if these are too small; slots at least double, up to `most`, so that moving is rare."""
        for i, (model, old) in enumerate(zip(self.models.all[1:], self._states, strict=True)):
            if slots > len(old) or capacity != old.capacity:
                new = model.new_state(slots if slots <= len(old) else min(max(slots, 2 * len(old)), most), capacity)
                if live := range(len(self.sequences)):
                    model.copy(old, live, new, live)
                self._states[i] = new  # not before: memory may not suffice

    def add(self, sequences: Sequence[Growing], states: Sequence[State], slots: Sequence[int]) -> None:
        """Take over sequences, of which slots of other states have read all but the newest token."""
        places = range(len(self.sequences), len(self.sequences) + len(sequences))
        for model, source, state in zip(self.models.all[1:], states, self._states, strict=True):
            model.copy(source, slots, state, places)
        self.sequences += sequences
        self._settings = None

    def add_sibling(self, sequence: Growing, sibling: Growing) -> None:
        """Take over a further completion of a prompt, from one that is being decoded."""
        self.add([sequence], self._states, [self.sequences.index(sibling)])
        for model, state in zip(self.models.all[1:], self._states, strict=True):
            excess = max(0, state.lengths[len(self.sequences) - 1] - (len(sequence.prompt) - 1))
            model.rollback(state, [0] * (len(self.sequences) - 1) + [excess])

    def parts(self, sequence: Growing) -> list[tuple[State, int]]:
        """The state of each of its models but the proposal, and its slot there."""
        return [(state, self.sequences.index(sequence)) for state in self._states]

    def remove(self, gone: Sequence[Growing]) -> None:
        """Let sequences go; the last ones move into their places."""
        for slot in sorted(map(self.sequences.index, gone), reverse=True):  # what goes, too, is not moved
            for model, state in zip(self.models.all[1:], self._states, strict=True):
                if self.sequences[slot].error:
                    state.wipe(slot)
                vacate(model, state, slot, len(self.sequences) - 1)
            self.sequences[slot] = self.sequences[-1]
            self.sequences.pop()
        self._settings = None

    def begin(self, rows: Sequence[Tensor | None]) -> Tensor:
        """Decide the first tokens of sequences that are in no slot yet; what `emit` needs to know, as `verify` gives it.

        Args:
            rows: those `[b, 1, V]` of all models after the prompts; None in the place of the proposal's if nobody reads them.
        """
        limits = [0] * len(self.sequences)
        settings, newest = self._lay_out(1)
        read = {i: row for i, row in enumerate(rows) if i and row is not None}
        drafts = Drafts(newest, self._look_up(1, newest.device) if self.models.lookup else None, read=read)
        if self.models.drafter is not None:
            drafts = Drafts(newest, *settings.draw(read[self.models.drafter], []), read)
        return self.verify(drafts, rows[0], {}, limits)

    def draft(self, limits: Sequence[int]) -> Drafts:
        """Draft up to `limits[j]` tokens for sequence j."""
        width = max(limits) + 1
        settings, newest = self._lay_out(width)
        device = newest.device
        drafter = self.models.drafter
        if drafter is None:
            return Drafts(newest, self._look_up(width, device) if self.models.lookup else None)
        only_drafts = self.models.draft is not None  # and is no aligner, whose rows the rule needs at every position
        self._bonus = bonus = not (only_drafts and settings.sampler.greedy and width > 1)
        may = [not only_drafts or can_draft(sequence) for sequence in self.sequences]
        if not any(may):
            return Drafts(newest)
        model, state = self.models.all[drafter], self._states[drafter - 1]
        token = newest
        drafts: list[Tensor] = []
        drawn_from: list[Tensor] = []
        own: list[Tensor] = []
        for j in range(width - 1 + bonus):
            counts = [int(able and j < limit + bonus) for able, limit in zip(may, limits, strict=True)]
            own.append(self._catch_up(model, state, counts) if j == 0 else model.extend(state, token.to(model.device), counts))
            token, row = settings.draw(own[-1].to(device), drafts)
            drafts.append(token.squeeze(1))
            if row is not None:
                drawn_from.append(row)
        rows = torch.cat(drawn_from, 1) if drawn_from else None
        read = {} if only_drafts else {drafter: torch.cat(own, 1).to(device)}
        return Drafts(newest, torch.stack(drafts, 1), rows, read, bonus=bonus)

    def verify(self, drafts: Drafts, logp: Tensor | None, tapped: dict[int, Tensor], limits: Sequence[int]) -> Tensor:
        """Decide the drafts; what `emit` needs to know, as numbers `[b, …]`.

        Args:
            drafts: what `draft` said.
            logp: the proposal's rows `[b, P, V]`; None where nobody reads them.
            tapped: by layer, the proposal's hidden states `[b, P, H]` that heads read.
            limits: as for `draft`.
        """
        settings = self._settings
        assert settings is not None
        device, counts = drafts.tokens.device, [limit + 1 for limit in limits]
        self._rows = [
            drafts.read[i]
            if i in drafts.read
            else model.extend(state, input_of(model, drafts.tokens, tapped), counts).to(device)
            for i, (model, state) in enumerate(zip(self.models.aligners, self._states, strict=False), start=1)
        ]
        logqs = list(self._rows)
        logp = settings.proposal_rows(logp, logqs)
        self._rows.insert(0, logp)
        inputs = settings.shaping.inputs(logp, logqs)
        contexts = settings.histories.contexts(inputs[0], drafts.tokens[:, 1:])
        aligned = settings.shaping.target(inputs, contexts)
        verdict = settings.decide(aligned, drafts, to_device(limits, device))
        tokens = settings.shaping.sample(inputs, settings.rowless_noise, verdict.tokens, contexts)
        if contexts:
            settings.histories.move_on(contexts, inputs[0], tokens, verdict.accepted + 1)
        settings.sampler.note(tokens, verdict.accepted)
        columns = [verdict.accepted[:, None], verdict.kept[:, None]]
        if self._observes:
            columns.append(settings.shaping.log_z(inputs, aligned, tokens[:, :1], contexts))
        columns.append(tokens)
        if settings.shaping.marks:
            columns.append(settings.shaping.marked(inputs, contexts))
        if settings.logprobs:
            columns += [gather(row, tokens.clamp(min=0)) for row in (logp, *logqs, aligned)]
        for row in (logp, aligned) if settings.top else ():
            columns += [part.flatten(1) for part in row.topk(settings.top, dim=-1)]
        return torch.cat([column.double() for column in columns], dim=-1)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forget the last `counts[j]` tokens of sequence j, which were read and not accepted."""
        for i, (model, state) in enumerate(zip(self.models.all[1:], self._states, strict=True), start=1):
            unread = i == self.models.drafter and not self._bonus  # the last draft, by the drafter
            model.rollback(state, [max(0, count - unread) for count in counts])

    def emit(self, values: Sequence[Sequence[float]], limits: Sequence[int]) -> list[TokenEvent]:
        """Hand what was decided to the sequences; a stop inside an accepted run discards the rest of the run.

        A sequence whose next-token distribution is NaN or has no mass ends there, with a `DeadRow` as its `error`.
        """
        events = []
        settings = self._settings
        assert settings is not None
        for slot, (sequence, limit, row) in enumerate(zip(self.sequences, limits, values, strict=True)):
            accepted, kept = int(row[0]), int(row[1])
            drawn = settings.read(row[2 + self._observes :], accepted + 1, max(limits) + 1)
            if self._observes:
                sequence.observe_log_z(row[2])
            for j, one in enumerate(drawn):
                if one.token < 0:
                    events.append(sequence.fail(self._explain(slot, j)))
                    break
                events.append(sequence.accept(one))
                if sequence.lookup is not None:
                    sequence.lookup.extend([one.token])
                if sequence.finish_reason:
                    break
            if can_draft(sequence):
                drafted = limit + self._bonus
                for hope in (sequence.hope, self._pace.kind(sequence.kind)):
                    hope.observe(min(kept, drafted), min(kept + 1, drafted))
            sequence.tally.observe(accepted, limit)
            self._pace.tally.observe(accepted, limit)
        self._rows = []
        self._steps += 1
        return events

    @property
    def _observes(self) -> bool:
        """Whether this step observes log Z."""
        return self._log_z_every > 0 and self._steps % self._log_z_every == 0

    def _lay_out(self, width: int) -> tuple["_Settings", Tensor]:
        """What the sequences want, for the next `width` positions, and the newest token of each, `[b, 1]`."""
        settings = self._settings = self._settings or _Settings(self.sequences, self.models)
        settings.start(width)
        return settings, to_device([[s.next_input] for s in self.sequences], self.models.proposal.device)

    def _catch_up(self, model: LanguageModel, state: State, counts: Sequence[int]) -> Tensor:
        """Rows `[b, 1, V]` of the drafter after the one or two tokens that it has not read yet; not where a count is 0."""
        known = zip(self.sequences, state.lengths, counts, strict=False)
        unread = [sequence.behind(length) if count else [] for sequence, length, count in known]
        read = [len(ids) for ids in unread]
        return last_of(model.extend(state, pad(unread, model.device), read), read)

    def _look_up(self, width: int, device: torch.device) -> Tensor:
        for s in self.sequences:
            s.lookup = s.lookup or Lookup([*s.prompt, *s.tokens])
        return to_device([s.lookup.drafts(width) for s in self.sequences if s.lookup], device)

    def _explain(self, slot: int, position: int) -> DeadRow:
        """Say who is to blame for a row without a token."""
        sequence = self.sequences[slot]
        rows = [rows[slot, position] for rows in self._rows]
        return explain_dead_row(sequence.shaping, rows, f"after {len(sequence.tokens)} tokens")


def can_draft(sequence: Growing) -> bool:
    """Whether drafts for it can be verified, and somebody drafts."""
    return sequence.shaping.rule.has_row and (sequence.models.lookup or sequence.models.drafter is not None)


class _Settings:
    """What the sequences of a group want, as tensors, until one joins or leaves."""

    def __init__(self, sequences: Sequence[Growing], models: Models) -> None:
        device = models.proposal.device
        self._sequences, self._device = list(sequences), device
        reads = [s.reads_proposal for s in sequences]
        self._reads = None if all(reads) else to_device(reads, device)[:, None, None]
        self.shaping = BatchShaping([s.shaping for s in sequences], device, alone=not any(reads))
        self.histories = Histories(self.shaping.members, [s.prompt for s in sequences], device, [s.place for s in sequences])
        for row, sequence in enumerate(sequences):
            sequence.place = self.histories.place(row)
        contexts = [[*s.prompt, *s.tokens] if s.params.repetition_penalty != 1 else [] for s in sequences]
        drafting = [s.shaping.draft_temperature for s in sequences]
        self.sampler = Sampler([s.params for s in sequences], contexts, models.proposal.vocab_size, device, drafting)
        self.logprobs = any(s.params.logprobs for s in sequences)
        self.top = min(max(s.params.top_logprobs for s in sequences), models.proposal.vocab_size)
        """How many of the best tokens somebody wants to know."""
        self.noise = torch.empty(0)
        """Uniforms `[b, P, 3]` for the positions of this step."""
        self._logprob_columns = 2 + len(models.aligners)
        self._block = torch.empty(0)
        self._starts: list[int] = []

    def start(self, width: int) -> None:
        """Lay out the noise for the next `width` positions of each sequence."""
        positions = [len(s.tokens) for s in self._sequences]
        offsets = [now - start for now, start in zip(positions, self._starts, strict=False)]
        if not offsets or max(offsets) + width > NOISE_BLOCK:
            seeds, indices = [s.seed for s in self._sequences], [s.index for s in self._sequences]
            self._block = uniforms(seeds, indices, positions, NOISE_BLOCK, DRAWS, self._device)
            self._starts, offsets = positions, [0] * len(positions)
        if len(set(offsets)) == 1:
            self.noise = self._block[:, offsets[0] : offsets[0] + width]
            return
        index = to_device(offsets, self._device)[:, None] + torch.arange(width, device=self._device)
        self.noise = self._block.gather(1, index[..., None].expand(-1, -1, DRAWS))

    def draw(self, row: Tensor, drafts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The next draft `[b, 1]`, and the row `[b, 1, V]` that it is drawn from; None where all take the best token.

        Args:
            row: the drafter's.
            drafts: those `[b]` before it.
        """
        if self.sampler.greedy:
            return self.sampler.best(row, drafts).clamp(min=0), None
        row = self.sampler.draft_rows(row, drafts)
        at = len(drafts)
        return draft_tokens(row, self.noise[:, at : at + 1]).clamp(min=0), row

    def decide(self, aligned: Tensor, drafts: Drafts, limits: Tensor) -> Verdict:
        """What becomes of the drafts, by the aligned rows `[b, P, V]`."""
        before = drafts.tokens[:, 1:].unbind(1)
        if self.sampler.greedy:
            return verify_greedy(self.sampler.best(aligned, before), drafts.drafts, limits)
        return verify(self.sampler.rows(aligned, before), drafts.drafts, drafts.drawn_from, limits, self.noise)

    def proposal_rows(self, logp: Tensor | None, logqs: Sequence[Tensor]) -> Tensor:
        """The proposal's rows `[b, P, V]`; even ones in the place of those that nobody reads, and that may mean nothing."""
        if self._reads is None:
            assert logp is not None
            return logp
        even = logqs[0].new_full((), -math.log(logqs[0].shape[-1]))
        return even.expand_as(logqs[0]) if logp is None else torch.where(self._reads, logp, even)

    def rowless_noise(self, slots: Sequence[int], draws: int) -> Tensor:
        """Uniforms `[b, 1, draws]` for the next position of some sequences, whose rule samples without a row."""
        asked = [self._sequences[slot] for slot in slots]
        seeds, indices, positions = zip(*((s.seed, s.index, len(s.tokens)) for s in asked), strict=True)
        return uniforms(seeds, indices, positions, 1, draws, self._device)

    def read(self, row: Sequence[float], count: int, width: int) -> list[Drawn]:
        """The first `count` tokens of one sequence, with all that belongs to them, out of the numbers of its P positions."""
        singles = 1 + self.shaping.marks + (self._logprob_columns if self.logprobs else 0)
        columns = [row[i * width : (i + 1) * width] for i in range(singles)]
        drawn = []
        for j in range(count):
            token, *rest = (column[j] for column in columns)
            tops = []
            for start in range(singles * width + j * self.top, len(row), 2 * self.top * width) if self.top else ():
                values, ids = row[start : start + self.top], row[start + self.top * width : start + self.top * (width + 1)]
                tops.append([(int(i), value) for i, value in zip(ids, values, strict=True)])
            drawn.append(Drawn(int(token), rest[self.shaping.marks :], bool(self.shaping.marks and rest[0]), tops))
        return drawn
