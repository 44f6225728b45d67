"""The weight that fits the development data best: a best λ far below the trained one betrays double counting."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trimtab.core.objectives import likelihood
from trimtab.core.rules import Rule
from trimtab.train.ranks import ALONE, Ranks

__all__ = ["RANGES", "tune_weight"]

RANGES = {"product": (0.0, 2.0), "geometric": (0.0, 1.0)}
"""Where to look, for the rules whose likelihood has one best weight: it is convex in it for both."""

STEPS = 8


def tune_weight(
    rule: Rule, rows: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]], ranks: Ranks = ALONE
) -> tuple[float, list[tuple[float, float]]]:
    """Search the rule's range in two passes, coarse and fine.

    Args:
        rule: `product` or `geometric`.
        rows: makes a fresh run through the development data, or this process's part: log p̃ and log q `[N, V]`, tokens `[N]`.
        ranks: the processes that have the parts.

    Returns:
        The best weight, and every weight tried with its negative log-likelihood in nats per token, in order.
    """
    low, high = RANGES[rule.name]
    step = (high - low) / STEPS
    tried = _losses(rule, [low + i * step for i in range(STEPS + 1)], rows(), ranks)
    centre = min(tried, key=lambda weight: tried[weight])
    fine = [centre + i * step / 4 for i in range(-3, 4) if i != 0]
    tried |= _losses(rule, [weight for weight in fine if low <= weight <= high], rows(), ranks)
    return min(tried, key=lambda weight: tried[weight]), sorted(tried.items())


def _losses(
    rule: Rule, weights: list[float], rows: Iterable[tuple[Tensor, Tensor, Tensor]], ranks: Ranks
) -> dict[float, float]:
    totals = torch.zeros(len(weights) + 1, dtype=torch.float64)  # the last one counts tokens
    for logp, logq, tokens in rows:
        losses = [likelihood(rule, logp, logq, w, tokens).double().sum().cpu() for w in weights]
        totals += torch.stack([*losses, torch.tensor(len(tokens), dtype=torch.float64)])
    *sums, count = ranks.total(totals).tolist()
    return dict(zip(weights, (total / count for total in sums), strict=True))
