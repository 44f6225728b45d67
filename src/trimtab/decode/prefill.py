"""Read prompts into a fresh state."""

from collections.abc import Sequence

import torch

from trimtab.core.transfer import to_device
from trimtab.models.base import LanguageModel, State

__all__ = ["pad", "prefill"]

CHUNK = 512
"""Tokens a slot reads in one forward pass; bounds the memory of activations."""


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], capacity: int, shared: int = 0) -> State:
    """A state that holds each prompt in a slot of its own, with room for `capacity` tokens.

    The first `shared` tokens of all prompts are the same: they are read once, and copied.
    """
    if shared:
        state = model.select(prefill(model, [prompts[0][:shared]], capacity), [0] * len(prompts))
    else:
        state = model.new_state(len(prompts), capacity)
    for start in range(shared, max(map(len, prompts)), CHUNK):
        chunks = [prompt[start : start + CHUNK] for prompt in prompts]
        model.prefill(state, pad(chunks, model.device), [len(chunk) for chunk in chunks])
    return state


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Ids `[B, K]`, filled up on the right with 0 to the longest."""
    width = max(map(len, sequences))
    return to_device([[*ids, *[0] * (width - len(ids))] for ids in sequences], device, torch.long)
