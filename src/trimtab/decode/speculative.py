"""One decoding step for a batch: draft, verify, emit. A draft length of 0 is decoding token by token.

    draft    the drafter reads the newest token, then its own drafts one by one; each is drawn from its row
    verify   the other models read the newest token and all drafts in one pass; the rule makes the target rows; every position
             is decided by its coupled draw (trimtab.core.speculation)
    emit     one transfer brings what was decided to the host; what was not accepted is rolled back

The sequences occupy the first slots of one state for each model. Whoever leaves is replaced by the last one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN
from trimtab.core.logprobs import gather
from trimtab.core.noise import uniforms
from trimtab.core.rules import KLGate
from trimtab.core.speculation import DRAWS, draft_tokens, verify
from trimtab.decode.draft import Lookup, Models
from trimtab.decode.pace import Pace
from trimtab.decode.request import TokenEvent
from trimtab.decode.sampler import Sampler
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.shaping import BatchShaping
from trimtab.errors import DeadRow
from trimtab.models.base import State

__all__ = ["Batch"]

NOISE_BLOCK = 64
"""Positions for which noise is drawn at once."""


class Batch:
    """The sequences that are being decoded.

    Args:
        models: what to run.
        pace: told what became of drafts.
    """

    def __init__(self, models: Models, pace: Pace) -> None:
        self.sequences: list[Growing] = []
        self._models, self._pace = models, pace
        self._states = [model.new_state(0, 0) for model in models.all]
        self._lookups: dict[Growing, Lookup] = {}
        self._settings: _Settings | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Slots, and tokens that each can hold."""
        return len(self._states[0]), self._states[0].capacity

    def resize(self, slots: int, capacity: int) -> None:
        """Move to new states of this size."""
        live = range(len(self.sequences))
        for i, model in enumerate(self._models.all):
            state = model.new_state(slots, capacity)
            if live:
                model.copy(self._states[i], live, state, live)
            self._states[i] = state

    def add(self, sequences: Sequence[Growing], states: Sequence[State], slots: Sequence[int]) -> None:
        """Take over sequences whose prompts, all but the last token, are in slots of other states."""
        places = range(len(self.sequences), len(self.sequences) + len(sequences))
        for model, source, state in zip(self._models.all, states, self._states, strict=True):
            model.copy(source, slots, state, places)
        self.sequences += sequences
        self._settings = None

    def add_sibling(self, sequence: Growing, sibling: Growing) -> None:
        """Take over a further completion of a prompt, from one that is being decoded."""
        slot = self.sequences.index(sibling)
        self.add([sequence], self._states, [slot])
        counts = [0] * (len(self.sequences) - 1) + [len(sibling.tokens)]
        for model, state in zip(self._models.all, self._states, strict=True):
            model.rollback(state, counts)

    def remove(self, gone: Sequence[Growing]) -> None:
        """Let sequences go; the last ones move into their places."""
        for sequence in gone:
            slot, last = self.sequences.index(sequence), len(self.sequences) - 1
            for model, state in zip(self._models.all, self._states, strict=True):
                if slot != last:
                    model.copy(state, [last], state, [slot])
                state.lengths[last] = 0
            self.sequences[slot] = self.sequences[last]
            self.sequences.pop()
            self._lookups.pop(sequence, None)
            self._settings = None

    def can_draft(self, sequence: Growing) -> bool:
        """Whether drafts for it can be verified, and somebody drafts."""
        return sequence.shaping.rule.has_row and (self._models.lookup or self._models.drafter is not None)

    def step(self, length: int) -> list[TokenEvent]:
        """Draft up to `length` tokens for each sequence and verify them: at least one token for each.

        A sequence whose next-token distribution is NaN or has no mass gets a `DeadRow` as its `error`, and no token.
        """
        settings = self._settings = self._settings or _Settings(self.sequences, self._models)
        limits = [min(length if self.can_draft(s) else 0, s.room - 1) for s in self.sequences]
        width = max(limits) + 1
        counts = [limit + 1 for limit in limits]
        device = self._models.proposal.device
        noise = settings.noise(width)
        newest = torch.tensor([[s.next_input] for s in self.sequences], device=device)
        drafts, drafted_from, read = self._draft(settings, newest, limits, noise)
        tokens = torch.cat([newest, drafts[:, :-1].clamp(min=0)], dim=1)
        rows = [
            read[i] if i in read else model.extend(state, tokens.to(model.device), counts).to(device)
            for i, (model, state) in enumerate(zip(self._models.all, self._states, strict=True))
        ]
        logp, logqs = rows[0], rows[1 : 1 + len(self._models.aligners)]
        inputs = settings.shaping.inputs(logp, logqs)
        aligned = settings.shaping.target(inputs)
        target = settings.sampler.rows(aligned, tokens[:, 1:].unbind(1))
        verdict = verify(target, drafts, drafted_from, torch.tensor(limits, device=device), noise)
        tokens = settings.shaping.sample(inputs, settings.rowless_noise, verdict.tokens)
        columns = [verdict.accepted[:, None], verdict.kept[:, None], tokens]
        if settings.gated:
            columns.append(settings.shaping.fallbacks(inputs))
        if settings.logprobs:
            columns += [gather(row, tokens.clamp(min=0)) for row in (logp, *logqs, aligned)]
        values = torch.cat([column.double() for column in columns], dim=-1).tolist()  # the step's only wait for the device
        accepted = [int(row[0]) for row in values]
        unread = [limit - count for limit, count in zip(limits, accepted, strict=True)]
        for model, state in zip(self._models.all, self._states, strict=True):
            model.rollback(state, unread)
        settings.sampler.note(tokens, verdict.accepted)
        return self._emit(values, limits, width, rows)

    def _draft(
        self, settings: "_Settings", newest: Tensor, limits: Sequence[int], noise: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Drafts `[B, P]`, the rows `[B, P, V]` they were drawn from if there are any, and the drafting model's own rows."""
        drafter, width = self._models.drafter, max(limits) + 1
        if drafter is None:
            return self._look_up(width, newest.device), None, {}
        model, state = self._models.all[drafter], self._states[drafter]
        token = newest
        drafts: list[Tensor] = []
        drafted_from: list[Tensor] = []
        own: list[Tensor] = []
        for j in range(width):
            row = model.extend(state, token.to(model.device), [int(j <= limit) for limit in limits]).to(newest.device)
            own.append(row)
            drafted_from.append(settings.sampler.draft_rows(row, drafts))
            drafts.append(draft_tokens(drafted_from[-1], noise[:, j : j + 1]).squeeze(1).clamp(min=0))
            token = drafts[-1][:, None]
        return torch.stack(drafts, 1), torch.cat(drafted_from, 1), {drafter: torch.cat(own, 1)}

    def _look_up(self, width: int, device: torch.device) -> Tensor:
        if not self._models.lookup:
            return torch.full((len(self.sequences), width), NO_TOKEN, device=device)
        for s in self.sequences:
            if s not in self._lookups:
                self._lookups[s] = Lookup([*s.prompt, *s.tokens])
        return torch.tensor([self._lookups[s].drafts(width) for s in self.sequences], device=device)

    def _emit(self, values: list[list[float]], limits: Sequence[int], width: int, rows: Sequence[Tensor]) -> list[TokenEvent]:
        """Hand what was decided to the sequences; a stop inside an accepted run discards the rest of the run."""
        events = []
        settings = self._settings
        assert settings is not None
        for slot, (sequence, limit, row) in enumerate(zip(self.sequences, limits, values, strict=True)):
            accepted, kept = int(row[0]), int(row[1])
            columns = [row[2 + i : 2 + i + width] for i in range(0, len(row) - 2, width)]
            for j in range(accepted + 1):
                token, *rest = (column[j] for column in columns)
                if token < 0:
                    sequence.error = self._explain(slot, j, rows)
                    break
                fell_back = bool(settings.gated and rest[0])
                events.append(sequence.accept(int(token), rest[settings.gated :], fell_back))
                if sequence in self._lookups:
                    self._lookups[sequence].extend([int(token)])
                if sequence.finish_reason:
                    break
            if self.can_draft(sequence):
                for hope in (sequence.hope, self._pace.kind(sequence.kind)):
                    hope.observe(kept, min(kept, limit) + 1)
            self._pace.tally.observe(accepted, limit)
        return events

    def _explain(self, slot: int, position: int, rows: Sequence[Tensor]) -> DeadRow:
        """Say which model is to blame for a row without a token."""
        sequence = self.sequences[slot]
        where = f"after {len(sequence.tokens)} tokens of completion {sequence.index} of prompt {sequence.prompt_index}"
        names = ["the proposal", *(f"aligner {i}" for i in range(len(self._models.aligners))), "the draft model"]
        for name, row in zip(names, rows, strict=False):
            if bool(row[slot, position].isnan().any()):
                return DeadRow(f"{name} gives NaN probabilities {where}: are its weights or its dtype sound?")
        return DeadRow(f"rule '{sequence.shaping.rule}' leaves no possible token {where}: loosen top-k, top-p or logit_bias")


class _Settings:
    """What the sequences of a batch want, as tensors, until one joins or leaves."""

    def __init__(self, sequences: Sequence[Growing], models: Models) -> None:
        device = models.proposal.device
        self._sequences, self._device = list(sequences), device
        self.shaping = BatchShaping([s.shaping for s in sequences], device)
        contexts = [[*s.prompt, *s.tokens] if s.params.repetition_penalty != 1 else [] for s in sequences]
        drafting = [s.shaping.draft_temperature for s in sequences]
        self.sampler = Sampler([s.params for s in sequences], contexts, models.proposal.vocab_size, device, drafting)
        self.gated = any(isinstance(s.shaping.rule, KLGate) for s in sequences)
        self.logprobs = any(s.params.logprobs for s in sequences)
        self._block = torch.empty(0)
        self._starts: list[int] = []

    def noise(self, width: int) -> Tensor:
        """Uniforms `[B, width, 3]` for the next positions of each sequence."""
        positions = [len(s.tokens) for s in self._sequences]
        offsets = [now - start for now, start in zip(positions, self._starts, strict=False)]
        if not offsets or max(offsets) + width > NOISE_BLOCK:
            seeds, indices = [s.seed for s in self._sequences], [s.index for s in self._sequences]
            self._block = uniforms(seeds, indices, positions, NOISE_BLOCK, DRAWS, self._device)
            self._starts, offsets = positions, [0] * len(positions)
        if len(set(offsets)) == 1:
            return self._block[:, offsets[0] : offsets[0] + width]
        index = torch.tensor(offsets, device=self._device)[:, None] + torch.arange(width, device=self._device)
        return self._block.gather(1, index[..., None].expand(-1, -1, DRAWS))

    def rowless_noise(self, slots: Sequence[int], draws: int) -> Tensor:
        """Uniforms `[b, 1, draws]` for the next position of some sequences, whose rule samples without a row."""
        asked = [self._sequences[slot] for slot in slots]
        seeds, indices, positions = zip(*((s.seed, s.index, len(s.tokens)) for s in asked), strict=True)
        return uniforms(seeds, indices, positions, 1, draws, self._device)
