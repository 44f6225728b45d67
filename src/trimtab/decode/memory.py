"""What the caches of sequences take in memory: those they decode in, those they read their prompts into, and old and new ones
together while a batch moves. What a pass needs on the way, activations and rows of the vocabulary, is not counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from trimtab.decode.draft import Models
from trimtab.decode.sequence import Sequence as Growing

__all__ = ["Size", "batch_bytes", "reading_bytes"]


class Size(NamedTuple):
    """Slots of a state, and tokens that each can hold."""

    slots: int = 0
    capacity: int = 0


def reading_bytes(sequences: Iterable[Growing]) -> int:
    """What sequences that are admitted together take while they read their prompts, each prompt once."""
    total = 0
    for models, members in _by_models(sequences).items():
        prompts = {id(sequence.prompt): len(sequence.prompt) for sequence in members}
        total += _state_bytes(models, 0, len(models.all), Size(len(prompts), max(prompts.values())), members)
    return total


def batch_bytes(
    old: Size, groups: Mapping[Models, Size], present: Sequence[Growing], coming: Sequence[Growing], new: Size
) -> int:
    """The most memory that the states of a batch take on the way from one size to another, and until all that come have joined.

    States move one after the other; while one does, it is there twice. A group's slots at least double when they grow.

    Args:
        old: the size of the proposal's state.
        groups: that of each group's states.
        present: sequences of the batch.
        coming: those that will be added.
        new: what the proposal's state becomes; it may stay as it is.
    """
    everyone = [*present, *coming]
    models = everyone[0].models
    before, after = (_state_bytes(models, 0, 1, size, everyone) for size in (old if present else Size(), new))
    total, twice = max(before, after), 0 if old == new else min(before, after)
    for models, members in _by_models(everyone).items():
        rooms = (groups.get(models, Size()), Size(min(2 * len(members), new.slots), new.capacity))
        before, after = (_state_bytes(models, 1, len(models.all), room, members) for room in rooms)
        growing = _state_bytes(models, 1, len(models.all), Size(len(members) - 1, new.capacity), members)
        total, twice = total + max(before, after), max(twice, growing, min(before, after))
    return total + twice


def _by_models(sequences: Iterable[Growing]) -> dict[Models, list[Growing]]:
    found: dict[Models, list[Growing]] = {}
    for sequence in sequences:
        found.setdefault(sequence.models, []).append(sequence)
    return found


def _state_bytes(models: Models, start: int, stop: int, size: Size, members: Sequence[Growing]) -> int:
    """What states of this size take for some of `models.all`, with the adapters that these sequences use."""
    used = [{sequence.models.adapters[i] for sequence in members} for i in range(start, stop)]
    return sum(model.state_bytes(*size, some) for model, some in zip(models.all[start:stop], used, strict=True))
