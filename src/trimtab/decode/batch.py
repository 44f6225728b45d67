"""One decoding step for everybody: each group drafts with its own models, the proposal reads all drafts in one pass, each group
verifies.

The sequences occupy the first slots of one state of the proposal, whichever aligners they have; so bare requests and those of
many aligners share every pass of the large model. Whoever leaves is replaced by the last one.
"""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.decode.draft import Models
from trimtab.decode.memory import Size, batch_bytes
from trimtab.decode.outcome import fetch
from trimtab.decode.pace import Pace
from trimtab.decode.reading import extend_proposal, taps_of
from trimtab.decode.request import TokenEvent
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.speculative import Drafts, Group
from trimtab.models.base import LanguageModel, State, vacate

__all__ = ["Batch"]


class Batch:
    """The sequences that are being decoded.

    Args:
        proposal: P_M, which all of them share.
        pace: told what became of drafts.
        log_z_every: also observe log Z, once in so many steps; 0 for never.
    """

    def __init__(self, proposal: LanguageModel, pace: Pace, *, log_z_every: int = 0) -> None:
        self.sequences: list[Growing] = []
        self._proposal, self._pace, self._log_z_every = proposal, pace, log_z_every
        self._state = proposal.new_state(0, 0)
        self._groups: dict[Models, Group] = {}
        self._begun = 0

    @property
    def size(self) -> Size:
        """Of the proposal's state."""
        return Size(len(self._state), self._state.capacity)

    @property
    def groups(self) -> int:
        """How many sets of models are at work."""
        return len(self._groups)

    def most_bytes(self, size: Size, coming: Sequence[Growing]) -> int:
        """The most memory that all states take until the batch has this size and these sequences have come."""
        groups = {models: group.size for models, group in self._groups.items()}
        return batch_bytes(self.size, groups, self.sequences, coming, size)

    def resize(self, slots: int, capacity: int) -> None:
        """Move to new states of this size."""
        state = self._proposal.new_state(slots, capacity)
        if live := range(len(self.sequences)):
            self._proposal.copy(self._state, live, state, live)
        self._state = state
        for group in self._groups.values():
            group.make_room(len(group.sequences), capacity, slots)

    def begin(self, new: Sequence[tuple[Models, Sequence[Growing], Sequence[Tensor | None]]]) -> list[list[TokenEvent]]:
        """Decide the first tokens of sequences that are to be added after it, if they go on.

        Args:
            new: those of the same models, and all models' rows after their prompts; see `Group.begin`.
        """
        groups, decided = [], []
        for models, sequences, rows in new:
            group = Group(models, self._pace, log_z_every=self._log_z_every, steps=self._begun)
            self._begun += 1
            group.sequences = list(sequences)
            groups.append(group)
            decided.append(group.begin(rows))
        return [group.emit(outcomes, [0] * len(outcomes)) for group, outcomes in zip(groups, fetch(decided), strict=True)]

    def add(self, models: Models, sequences: Sequence[Growing], states: Sequence[State], slots: Sequence[int]) -> None:
        """Take over sequences of these models, of which slots of other states have read all but the newest token."""
        places = range(len(self.sequences), len(self.sequences) + len(sequences))
        self._proposal.copy(states[0], slots, self._state, places)
        group = self._group(models, len(sequences))
        group.add(sequences, states[1:], slots)
        self._groups[group.models] = group  # not before: memory may not suffice, and no group is empty
        self.sequences += sequences

    def add_sibling(self, sequence: Growing, sibling: Growing) -> None:
        """Take over a further completion of a prompt, from one that is being decoded."""
        slot, place = self.sequences.index(sibling), len(self.sequences)
        self._proposal.copy(self._state, [slot], self._state, [place])
        self._proposal.rollback(self._state, [0] * place + [len(sibling.tokens)])
        self._group(sequence.models, 1).add_sibling(sequence, sibling)
        self.sequences.append(sequence)

    def parts(self, sequence: Growing) -> list[tuple[State, int]]:
        """The state of each of a sequence's models, and its slot there."""
        return [(self._state, self.sequences.index(sequence)), *self._groups[sequence.models].parts(sequence)]

    def remove(self, gone: Sequence[Growing]) -> None:
        """Let sequences go; a group that is empty goes, too, and with it its hold on its models."""
        for slot in sorted(map(self.sequences.index, gone), reverse=True):  # or slots would be filled with what goes, too
            if self.sequences[slot].error:
                self._state.wipe(slot)
            vacate(self._proposal, self._state, slot, len(self.sequences) - 1)
            self.sequences[slot] = self.sequences[-1]
            self.sequences.pop()
        for models in dict.fromkeys(sequence.models for sequence in gone):
            self._remove(models, [sequence for sequence in gone if sequence.models == models])

    def step(self, limits: Sequence[int]) -> list[TokenEvent]:
        """Draft up to `limits[i]` tokens for sequence i and verify them: at least one token for each.

        A sequence whose next-token distribution is NaN or has no mass ends there, with a `DeadRow` as its `error`.
        """
        place = {sequence: i for i, sequence in enumerate(self.sequences)}
        groups = list(self._groups.values())
        places = [[place[sequence] for sequence in group.sequences] for group in groups]
        wanted = [[limits[i] for i in mine] for mine in places]
        drafts = [group.draft(mine) for group, mine in zip(groups, wanted, strict=True)]
        device = self._proposal.device
        index: list[Tensor | None]
        if len(groups) == 1 and places[0] == list(range(len(place))):
            index = [None]
            tokens = drafts[0].tokens
        else:
            index = [to_device(mine, device) for mine in places]
            tokens = drafts[0].tokens.new_zeros(len(place), max(limits) + 1)
            for mine, draft in zip(index, drafts, strict=True):
                tokens[mine, : draft.tokens.shape[1]] = draft.tokens
        counts = [limit + 1 for limit in limits]
        taps = {tap for group in groups for tap in taps_of(group.models.aligners)}
        wanted_rows = any(s.reads_proposal for s in self.sequences)
        logp, tapped = extend_proposal(self._proposal, self._state, tokens.to(device), counts, taps, wanted=wanted_rows)
        decided = [
            group.verify(
                draft,
                None if logp is None else _part(logp, mine, draft),
                {tap: _part(h, mine, draft) for tap, h in tapped.items()},
                want,
            )
            for group, draft, mine, want in zip(groups, drafts, index, wanted, strict=True)
        ]
        events, unread = [], [0] * len(place)
        for group, outcomes, slots, want in zip(groups, fetch(decided), places, wanted, strict=True):
            for i, limit, outcome in zip(slots, want, outcomes, strict=True):
                unread[i] = limit - outcome.accepted
            group.rollback(outcomes)
            events += group.emit(outcomes, want)
        self._proposal.rollback(self._state, unread)
        return events

    def part(self, leaving: Sequence[Growing]) -> None:
        """Part sequences from their aligners, once a rule has handed over: in the proposal's state they stay where they are."""
        for models in dict.fromkeys(sequence.models for sequence in leaving):
            gone = [sequence for sequence in leaving if sequence.models == models]
            self._remove(models, gone)
            for sequence in gone:
                sequence.leave()
            bare = self._group(gone[0].models, len(gone))
            bare.add(gone, (), ())
            self._groups[bare.models] = bare

    def _remove(self, models: Models, gone: Sequence[Growing]) -> None:
        """Let sequences of a group go, and the group if it is empty."""
        self._groups[models].remove(gone)
        if not self._groups[models].sequences:
            del self._groups[models]

    def _group(self, models: Models, more: int) -> Group:
        """The group of these models, with room for so many more."""
        group = self._groups.get(models)
        if group is None:
            models = dataclasses.replace(models, adapters=())  # or it would hold its first request's for as long as it lives
            group = Group(models, self._pace, log_z_every=self._log_z_every)
        group.make_room(len(group.sequences) + more, self._state.capacity, len(self._state))
        return group


def _part(values: Tensor, mine: Tensor | None, draft: Drafts) -> Tensor:
    """Of values `[B, K, …]` of the batch a group's own, `[b, P, …]`: those of its slots, or all where there is one group."""
    return values if mine is None else values[mine, : draft.tokens.shape[1]]
