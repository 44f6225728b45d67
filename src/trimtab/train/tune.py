"""The weight that fits the development data best: a best λ far below the trained one betrays double counting."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from trimtab.core.rules import Rule
from trimtab.train.ranks import ALONE, Ranks

__all__ = ["RANGES", "tune_weight"]

RANGES = {"product": (0.0, 2.0), "geometric": (0.0, 1.0)}
"""Where to look, for the rules whose likelihood, or divergence from a teacher, has one best weight: both are convex in it."""

STEPS = 8

Losses: TypeAlias = Iterable[Callable[[float], Tensor]]
"""For each piece of the development data, or of this process's part: from a weight to the losses of its tokens `[n]`."""


def tune_weight(rule: Rule, losses: Callable[[], Losses], ranks: Ranks = ALONE) -> tuple[float, list[tuple[float, float]]]:
    """Search the rule's range in two passes, coarse and fine.

    Args:
        rule: `product` or `geometric`.
        losses: makes a fresh run through the development data.
        ranks: the processes that have the parts.

    Returns:
        The best weight, and every weight tried with its loss in nats per token, in order.
    """
    low, high = RANGES[rule.name]
    step = (high - low) / STEPS
    tried = _means([low + i * step for i in range(STEPS + 1)], losses(), ranks)
    centre = min(tried, key=lambda weight: tried[weight])
    fine = [centre + i * step / 4 for i in range(-3, 4) if i != 0]
    tried |= _means([weight for weight in fine if low <= weight <= high], losses(), ranks)
    return min(tried, key=lambda weight: tried[weight]), sorted(tried.items())


def _means(weights: list[float], losses: Losses, ranks: Ranks) -> dict[float, float]:
    totals = torch.zeros(len(weights) + 1, dtype=torch.float64)  # the last one counts tokens
    for loss_at in losses:
        each = torch.stack([loss_at(weight).double() for weight in weights])
        totals += torch.cat([each.sum(-1), each.new_tensor([each.shape[-1]])]).cpu()
    *sums, count = ranks.total(totals).tolist()
    return dict(zip(weights, (total / count for total in sums), strict=True))
