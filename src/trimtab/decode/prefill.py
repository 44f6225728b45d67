"""Read prompts into fresh states: all at once, or in chunks, beside others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.decode.draft import Models
from trimtab.decode.prefixes import Prefixes
from trimtab.decode.reading import prefill_all
from trimtab.decode.sequence import Sequence as Growing
from trimtab.models.base import LanguageModel, State, vacate

__all__ = ["Reading", "pad", "prefill"]

CHUNK = 512
"""Tokens a slot reads in one forward pass; bounds the memory of activations."""


def prefill(models: Sequence[LanguageModel], prompts: Sequence[Sequence[int]], capacity: int, shared: int = 0) -> list[State]:
    """A state of each model that holds each prompt in a slot of its own, with room for `capacity` tokens.

    Args:
        models: the proposal first, if heads are among them.
        prompts: ids.
        capacity: tokens that a slot can hold.
        shared: how many tokens all prompts begin with that are to be read once, and copied.
    """
    if shared:
        once = prefill(models, [prompts[0][:shared]], capacity)
        states = [model.select(state, [0] * len(prompts)) for model, state in zip(models, once, strict=True)]
    else:
        states = [model.new_state(len(prompts), capacity) for model in models]
    for start in range(shared, max(map(len, prompts)), CHUNK):
        chunks = [prompt[start : start + CHUNK] for prompt in prompts]
        prefill_all(models, states, pad(chunks, models[0].device), [len(chunk) for chunk in chunks])
    return states


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Ids `[B, K]`, filled up on the right with 0 to the longest."""
    width = max(map(len, sequences))
    return to_device([[*ids, *[0] * (width - len(ids))] for ids in sequences], device, torch.long)


class Reading:
    """Sequences of the same models that were admitted together and read their prompts.

    Args:
        models: what they are decoded with.
        sequences: those.
        prefixes: what was read before them.
    """

    def __init__(self, models: Models, sequences: Sequence[Growing], prefixes: Prefixes) -> None:
        self._prompts: list[list[int]] = []
        self._readers: list[list[Growing]] = []
        self.models = models
        for sequence in sequences:
            if not self.join(sequence):
                self._prompts.append(sequence.prompt)
                self._readers.append([sequence])
        longest = max(map(len, self._prompts))
        self.states = [model.new_state(len(self._prompts), longest) for model in models.all]
        for i, state in enumerate(self.states):
            state.adapters = [readers[0].models.adapters[i] for readers in self._readers]
        for slot, (first, *_) in enumerate(self._readers):
            first.cached_tokens = prefixes.take(first, self.states, slot)

    def __len__(self) -> int:
        return sum(map(len, self._readers))

    @property
    def sequences(self) -> list[Growing]:
        """Those that are still reading."""
        return [sequence for readers in self._readers for sequence in readers]

    @property
    def num_bytes(self) -> int:
        """What the states take, until the last prompt is read."""
        return sum(
            model.state_bytes(len(state), state.capacity, set(state.adapters[: len(self._prompts)]))
            for model, state in zip(self.models.all, self.states, strict=True)
        )

    def join(self, sequence: Growing) -> bool:
        """Read along with a sibling, if one is here."""
        for prompt, readers in zip(self._prompts, self._readers, strict=True):
            if prompt is sequence.prompt and readers:
                readers.append(sequence)
                return True
        return False

    def drop(self, gone: set[Growing]) -> None:
        """Forget cancelled sequences; a prompt without readers is read no further."""
        self._readers = [[s for s in readers if s not in gone] for readers in self._readers]

    def step(self, budget: int) -> tuple[int, dict[Growing, int], list[Tensor | None]]:
        """Read up to `budget` tokens, the same share of each prompt.

        Returns:
            How many tokens were read; the sequences that are through, with the slot of each; and all models' rows `[b, 1, V]`
            after their prompts, None in the place of the proposal's if nobody wants them.
        """
        self._close_ranks()
        lengths = self.states[0].lengths[: len(self._prompts)]
        left = [len(p) - n for p, n in zip(self._prompts, lengths, strict=True)]
        share = max(1, budget // len(left))
        chunks = [p[n : n + min(share, k)] for p, n, k in zip(self._prompts, lengths, left, strict=True)]
        tokens = pad(chunks, self.models.proposal.device)
        wanted = any(s.reads_proposal for s in self.sequences)
        rows = prefill_all(self.models.all, self.states, tokens, [len(chunk) for chunk in chunks], wanted=wanted)
        done = [i for i, prompt in enumerate(self._prompts) if self.states[0].lengths[i] == len(prompt)]
        slots = {sequence: i for i in done for sequence in self._readers[i]}
        for i in done:
            self._readers[i] = []
        if slots:
            index = to_device(list(slots.values()), self.models.proposal.device)
            rows = [row if row is None else row[index] for row in rows]
        return sum(map(len, chunks)), slots, rows

    def _close_ranks(self) -> None:
        """Give up the slots of prompts that nobody reads any more, so that no pass is made for them."""
        for i in reversed(range(len(self._prompts))):
            if not self._readers[i]:
                for model, state in zip(self.models.all, self.states, strict=True):
                    vacate(model, state, i, len(self._prompts) - 1)
                for items in (self._prompts, self._readers):
                    items[i] = items[-1]  # type: ignore[assignment]
                    items.pop()
