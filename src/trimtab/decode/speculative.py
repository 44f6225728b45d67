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
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN
from trimtab.core.logprobs import gather
from trimtab.core.noise import uniforms
from trimtab.core.speculation import DRAWS, Verdict, draft_tokens, match, verify
from trimtab.core.transfer import to_device
from trimtab.decode.draft import Models
from trimtab.decode.drafters import Drafted, Drafter, Step
from trimtab.decode.history import Histories
from trimtab.decode.memory import Size
from trimtab.decode.outcome import Best, Decided, Outcome
from trimtab.decode.pace import Pace
from trimtab.decode.prefill import pad
from trimtab.decode.reading import input_of
from trimtab.decode.request import TokenEvent
from trimtab.decode.sampler import Sampler
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.shaping import BatchShaping, explain_dead_row
from trimtab.errors import DeadRow, InvalidOption
from trimtab.models.base import LanguageModel, State, last_of, vacate

__all__ = ["Drafts", "Group"]

NOISE_BLOCK = 64
"""Positions for which noise is drawn at once."""


class Drafts:
    """What a group proposes to verify in one step.

    Args:
        newest: `[b, 1]` the last token of each sequence.
        drafted: what its drafter says.
        read: rows of models that have read `tokens` already, by their place in `Models.all`, beside those of the drafter.
        width: P.

    Attributes:
        tokens: `[b, P]` what the models read: the newest token of each sequence, then its drafts, but for the bonus position's.
        drafts: `[b, P]` one for each position, or `[b, P − 1]`, none for the bonus position; None where nobody drafts.
        drawn_from: the rows `[b, P, V]` they were drawn from, if there are any and not all are the best ones.
        bonus: whether there are drafts for bonus positions, or none at all.
    """

    def __init__(self, newest: Tensor, drafted: Drafted, read: Mapping[int, Tensor], width: int) -> None:
        self.drafts, self.drawn_from, self.read = drafted.tokens, drafted.rows, {**read, **drafted.read}
        self.bonus = self.drafts is None or self.drafts.shape[1] == width
        self.tokens = newest
        if self.drafts is not None:
            self.tokens = torch.cat([newest, self.drafts[:, : width - 1].clamp(min=0)], dim=1)


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

    def begin(self, rows: Sequence[Tensor | None]) -> Decided:
        """Decide the first tokens of sequences that are in no slot yet; what `fetch` brings to the host, as `verify` gives it.

        Args:
            rows: those `[b, 1, V]` of all models after the prompts; None in the place of the proposal's if nobody reads them.
        """
        limits = [0] * len(self.sequences)
        read = {i: row for i, row in enumerate(rows) if i and row is not None}
        return self.verify(self._ask(limits, read), rows[0], {}, limits)

    def draft(self, limits: Sequence[int]) -> Drafts:
        """Draft up to `limits[j]` tokens for sequence j."""
        return self._ask(limits, {})

    def _ask(self, limits: Sequence[int], read: Mapping[int, Tensor]) -> Drafts:
        """Ask the drafter; `read` are rows of models that have read the newest tokens already, by their places."""
        settings, newest = self._lay_out(max(limits) + 1)
        drafter = self.models.drafter
        if drafter.looks:
            return Drafts(newest, self._looked_up(limits), read, max(limits) + 1)

        def rows(place: int, token: Tensor | None, counts: Sequence[int]) -> Tensor:
            if token is None and place in read:
                return read[place]
            model, state = self.models.all[place], self._states[place - 1]
            if token is None:
                return self._catch_up(model, state, counts).to(newest.device)
            return model.extend(state, token.to(model.device), counts).to(newest.device)

        step = Step(
            settings.memories,
            limits,
            settings.able,
            newest,
            greedy=settings.sampler.greedy,
            aligners=len(self.models.aligners),
            vocab_size=self.models.proposal.vocab_size,
            draw=settings.draw,
            rows=rows,
        )
        drafts = Drafts(newest, _checked(drafter, drafter.draft(step), step), read, step.width)
        self._bonus = drafts.bonus
        return drafts

    def _looked_up(self, limits: Sequence[int]) -> Drafted:
        """As much of each guess as may be accepted, on the device."""
        if not (longest := max(limits)):
            return Drafted()
        guesses = [sequence.guess[:limit] for sequence, limit in zip(self.sequences, limits, strict=True)]
        padded = [[*guess, *[NO_TOKEN] * (longest - len(guess))] for guess in guesses]
        return Drafted(to_device(padded, self.models.proposal.device))

    def verify(self, drafts: Drafts, logp: Tensor | None, tapped: dict[int, Tensor], limits: Sequence[int]) -> Decided:
        """Decide the drafts: what `fetch` brings to the host.

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
        contexts = settings.histories.contexts(inputs[0], drafts.tokens[:, 1:]) if settings.histories else {}
        aligned = settings.shaping.target(inputs, contexts)
        alone = settings.shaping.alone(inputs, contexts)
        verdict = settings.decide(aligned, drafts, to_device(limits, device), alone)
        tokens = settings.shaping.sample(inputs, settings.rowless_noise, verdict.tokens, contexts)
        if contexts:
            settings.histories.move_on(contexts, inputs[0], tokens, verdict.accepted + 1)
        settings.sampler.note(tokens, verdict.accepted)
        log_z = None
        if self._observes:
            log_z = settings.shaping.log_z(inputs, aligned, tokens[:, :1], contexts)[:, 0]
        marked = settings.shaping.marked(inputs, contexts) if settings.shaping.marks else None
        logprobs, best = None, None
        if settings.logprobs:
            at = tokens.clamp(min=0)
            logprobs = torch.stack([gather(row, at).double() for row in (logp, *logqs, aligned)], -1)
        if settings.top:
            best = Best(*logp.topk(settings.top, dim=-1)), Best(*aligned.topk(settings.top, dim=-1))
        return Decided(verdict.accepted, verdict.kept, tokens, log_z, marked, logprobs, best)

    def rollback(self, outcomes: Sequence[Outcome]) -> None:
        """Forget what was read of each sequence and not accepted. A drafter may not have read its last draft."""
        known = [len(s.prompt) + len(s.tokens) + one.accepted for s, one in zip(self.sequences, outcomes, strict=True)]
        for model, state in zip(self.models.all[1:], self._states, strict=True):
            model.rollback(state, [max(0, read - right) for read, right in zip(state.lengths, known, strict=False)])

    def emit(self, outcomes: Sequence[Outcome], limits: Sequence[int]) -> list[TokenEvent]:
        """Hand what was decided to the sequences; a stop inside an accepted run discards the rest of the run.

        A sequence whose next-token distribution is NaN or has no mass ends there, with a `DeadRow` as its `error`.
        """
        events = []
        for slot, (sequence, limit, outcome) in enumerate(zip(self.sequences, limits, outcomes, strict=True)):
            sequence.observe_log_z(outcome.log_z)
            taken = []
            for j, one in enumerate(outcome.drawn):
                if one.token < 0:
                    events.append(sequence.fail(self._explain(slot, j)))
                    break
                events.append(sequence.accept(one))
                taken.append(one.token)
                if sequence.finish_reason:
                    break
            if taken:
                self.models.drafter.accepted(sequence.memory, taken)
            if self.models.drafter.looks:
                sequence.judge(taken, self._pace.kind(sequence.kind))
            elif sequence.can_draft:
                drafted = limit + self._bonus
                for hope in (sequence.hope, self._pace.kind(sequence.kind)):
                    hope.observe(min(outcome.kept, drafted), min(outcome.kept + 1, drafted))
            sequence.tally.observe(outcome.accepted, limit)
            self._pace.tally.observe(outcome.accepted, limit)
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

    def _explain(self, slot: int, position: int) -> DeadRow:
        """Say who is to blame for a row without a token."""
        sequence = self.sequences[slot]
        rows = [rows[slot, position] for rows in self._rows]
        return explain_dead_row(sequence.shaping, rows, f"after {len(sequence.tokens)} tokens")


def _checked(drafter: Drafter, drafted: Drafted, step: Step) -> Drafted:
    """What a drafter says, if it is of the right form; whatever it is, it only costs time.

    Raises:
        InvalidOption: it is not.
    """
    tokens, rows, (count, width) = drafted.tokens, drafted.rows, (len(step.limits), step.width)
    if tokens is None:
        return drafted
    fits = tokens.shape == (count, width) or (step.greedy and tokens.shape == (count, width - 1))
    if not fits or tokens.dtype != torch.long or tokens.device != step.newest.device:
        given = f"{tokens.dtype} {list(tokens.shape)} on {tokens.device}"
        wanted = f"int64 {[count, width]} on {step.newest.device}"
        raise InvalidOption(f"draft: '{drafter.name}' gave {given} for tokens, and must give {wanted}")
    if rows is not None and rows.shape[:2] != tokens.shape:
        raise InvalidOption(f"draft: '{drafter.name}' gave rows of shape {list(rows.shape)} for tokens {list(tokens.shape)}")
    return drafted


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
        self.memories = [sequence.remember() for sequence in sequences]
        """What their drafter keeps of their texts."""
        self.able = [sequence.can_draft for sequence in sequences]
        self.logprobs = any(s.params.logprobs for s in sequences)
        self.top = min(max(s.params.top_logprobs for s in sequences), models.proposal.vocab_size)
        """How many of the best tokens somebody wants to know."""
        self.noise = torch.empty(0)
        """Uniforms `[b, P, 3]` for the positions of this step."""
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

    def decide(self, aligned: Tensor, drafts: Drafts, limits: Tensor, alone: Tensor | None) -> Verdict:
        """What becomes of the drafts, by the aligned rows `[b, P, V]`; `alone` as in `verify`."""
        before = drafts.tokens[:, 1:].unbind(1)
        if self.sampler.greedy:
            return match(self.sampler.best(aligned, before), drafts.drafts, limits)
        return verify(self.sampler.rows(aligned, before), drafts.drafts, drafts.drawn_from, limits, self.noise, alone)

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
