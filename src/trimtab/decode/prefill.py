"""Read prompts into fresh states."""

from collections.abc import Sequence

import torch

from trimtab.core.transfer import to_device
from trimtab.decode.reading import prefill_all
from trimtab.models.base import LanguageModel, State

__all__ = ["pad", "prefill"]

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
