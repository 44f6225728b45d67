"""Micro-batches in which the samples of a group share one reading of their prompt.

A group becomes one row: the prompt but for its last token, and behind it, for each answer, that token and all of the answer
but its last one: what is said after each of these is the answer. Each such part has the positions that it would have behind the
prompt alone, and a mask lets it see the prompt and itself. So of n samples the prompt is read once and not n times, forth and
back. Logits are as those of `trimtab.train.batches`, but for the last bits.

Attention over a row costs more than over its parts, so long rows are not packed; nor is what has no ready mask: recurrent
models, and other attention than SDPA's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data.examples import Example
from trimtab.errors import UnsupportedModel
from trimtab.models.masks import Sight, is_recurrent, sights_of

__all__ = ["can_pack", "pack"]

LONGEST = 4096
"""Tokens of a row."""

PROMPT, PADDING = -1, -2
"""Which answer a column belongs to, where it is none's."""


def can_pack(configs: Sequence[Any], groups: Sequence[Sequence[Example]]) -> bool:
    """Whether models take such masks, and the same ones; there are prompts to be shared; and rows are short enough."""
    if any(is_recurrent(config) or config._attn_implementation != "sdpa" for config in configs):
        return False
    try:
        sights = [sights_of(config) for config in configs]
    except UnsupportedModel:
        return False
    if any(other != sights[0] for other in sights) or all(len(group) == 1 for group in groups):
        return False
    return max(len(group[0].prompt) + sum(len(example.chosen) for example in group) for group in groups) <= LONGEST


def pack(config: Any, groups: Sequence[Sequence[Example]], hidden: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Tensors of a batch, as `collate` makes them of the examples of all groups in their order.

    `chosen_row` `[N]` says which row each token is in; `chosen_attention` is the mask `[G, 1, L, L]`, or one for each kind of
    layer.

    Args:
        config: the model's.
        groups: the examples of each group, whose prompts are equal.
        hidden: of each example in their order, what `collate` takes of it.
    """
    before = max(1, max(len(group[0].prompt) - 1 for group in groups))
    behind = max(sum(len(example.chosen) for example in group) for group in groups)
    ids, positions = torch.zeros(2, len(groups), before + behind, dtype=torch.long)
    segments = torch.full_like(ids, PADDING)
    places, states = [], []
    count = 0
    for row, group in enumerate(groups):
        *prompt, last = group[0].prompt
        there = slice(before - len(prompt), before)
        ids[row, there] = torch.tensor(prompt, dtype=torch.long)
        positions[row, there] = torch.arange(len(prompt))
        segments[row, there] = PROMPT
        at = before
        for answer, example in enumerate(group):
            length = len(example.chosen)
            there = slice(at, at + length)
            ids[row, there] = torch.tensor([last, *example.chosen[:-1]])
            positions[row, there] = len(prompt) + torch.arange(length)
            segments[row, there] = answer
            column = at - before + 1 + torch.arange(length)  # the first of a model's logits is the one before them
            places.append(torch.stack([torch.full_like(column, row), torch.full_like(column, count), column]))
            if hidden[count]:
                states.append((row, there, len(prompt), hidden[count]["chosen"]))
            at, count = at + length, count + 1
    rows, owners, columns = torch.cat(places, 1)
    seen = _sees(segments, positions)
    masks = {name: seen & _in_sight(sight, positions) for name, sight in sights_of(config).items()}
    batch: dict[str, Any] = {
        "chosen_ids": ids,
        "chosen_attention": masks if len(masks) > 1 else next(iter(masks.values())),
        "chosen_positions": positions,
        "chosen_mask": segments[:, before:] >= 0,
        "chosen_row": rows,
        "chosen_owner": owners,
        "chosen_column": columns,
    }
    batch["chosen_tokens"] = torch.cat([torch.tensor(example.chosen) for group in groups for example in group])
    if states:
        batch["chosen_hidden"] = _lay_out(states, ids, before)
    return batch


def _sees(segments: Tensor, positions: Tensor) -> Tensor:
    """`[G, 1, L, L]`: an answer's tokens see the prompt and itself, up to themselves; what is padding sees itself."""
    query, key = segments[:, :, None], segments[:, None, :]
    seen = ((key == query) | (key == PROMPT)) & (query != PADDING) & (positions[:, None, :] <= positions[:, :, None])
    return (seen | torch.eye(segments.shape[1], dtype=torch.bool)).unsqueeze(1)


def _in_sight(sight: Sight, positions: Tensor) -> Tensor:
    """`[G, 1, L, L]`: which positions a kind of layer looks at."""
    query, key = positions[:, None, :, None], positions[:, None, None, :]
    seen = torch.ones_like(query == key)
    if sight.window is not None:
        seen &= key > query - sight.window
    if sight.chunk is not None:
        seen &= key // sight.chunk == query // sight.chunk
    return seen


def _lay_out(states: Sequence[tuple[int, slice, int, Tensor]], ids: Tensor, before: int) -> Tensor:
    """Hidden states of prompts and answers in the places of their tokens `[G, L, H]`; a group's prompt is its first one's."""
    whole = states[0][3].new_zeros(*ids.shape, states[0][3].shape[-1])
    for row, there, prompt, found in reversed(states):
        whole[row, before - prompt : before] = found[:prompt]
        whole[row, there] = found[prompt:-1]
    return whole
