"""The weight that fits the development data best: a best λ far below the trained one betrays double counting.

A budget in nats a token bounds how far the aligned model may be from the proposal. KL(aligned‖p̃) grows with the weight, for
`product` (its derivative is λ times the variance of log q under the target) as for `geometric`, and the likelihood has one
best weight; so where that one is beyond the budget, the largest weight within it is the best.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.logprobs import gather, kl_divergence
from trimtab.core.rules import Rule
from trimtab.train.ranks import ALONE, Ranks

__all__ = ["RANGES", "Tuned", "tune_weight"]

RANGES = {"product": (0.0, 2.0), "geometric": (0.0, 1.0)}
"""Where to look, for the rules whose likelihood has one best weight: it is convex in it for both."""

STEPS = 8


class Tuned(NamedTuple):
    """The best weight, and what was tried."""

    weight: float
    tried: list[tuple[float, float]]
    """Every weight tried, with its negative log-likelihood in nats a token, in order."""
    kl: float
    """KL(aligned‖p̃) at the best weight, in nats a token."""
    bound: bool
    """Whether a budget kept a better weight out."""


def tune_weight(
    rule: Rule,
    rows: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]],
    ranks: Ranks = ALONE,
    max_kl: float | None = None,
) -> Tuned:
    """Search the rule's range in two passes, coarse and fine; in a third one, finer, where a budget binds.

    Args:
        rule: `product` or `geometric`.
        rows: makes a fresh run through the development data, or this process's part: log p̃ and log q `[N, V]`, tokens `[N]`.
        ranks: the processes that have the parts.
        max_kl: no more KL(aligned‖p̃) than that, in nats a token; weight 0, which has none, is always among those tried.
    """
    low, high = RANGES[rule.name]
    step = (high - low) / STEPS
    found = _measure(rule, [low + i * step for i in range(STEPS + 1)], rows(), ranks)
    centre = _best(found, max_kl)
    fine = [centre + i * step / 4 for i in range(-3, 4) if i != 0]
    found |= _measure(rule, [weight for weight in fine if low <= weight <= high], rows(), ranks)
    best = _best(found, max_kl)
    bound = best != _best(found, None)
    if bound:  # the budget ends between this weight and the next one
        beyond = min(weight for weight in found if weight > best)
        found |= _measure(rule, [best + i * (beyond - best) / STEPS for i in range(1, STEPS)], rows(), ranks)
        best = _best(found, max_kl)
    return Tuned(best, [(weight, found[weight][0]) for weight in sorted(found)], found[best][1], bound)


def _best(found: dict[float, tuple[float, float]], max_kl: float | None) -> float:
    allowed = [weight for weight, (_, kl) in found.items() if max_kl is None or weight == 0 or kl <= max_kl]
    return min(allowed, key=lambda weight: found[weight][0])


def _measure(
    rule: Rule, weights: list[float], rows: Iterable[tuple[Tensor, Tensor, Tensor]], ranks: Ranks
) -> dict[float, tuple[float, float]]:
    """By weight, the negative log-likelihood and KL(aligned‖p̃), in nats a token."""
    totals = torch.zeros(2 * len(weights) + 1, dtype=torch.float64)  # the last one counts tokens
    for logp, logq, tokens in rows:
        for i, weight in enumerate(weights):
            aligned = rule.target(logp, [logq], logq.new_tensor([weight]))
            sums = (-gather(aligned, tokens)).double().sum(), kl_divergence(aligned, logp).double().sum()
            totals[2 * i : 2 * i + 2] += torch.stack(sums).cpu()
        totals[-1] += len(tokens)
    *sums_of, count = ranks.total(totals).tolist()
    return {weight: (sums_of[2 * i] / count, sums_of[2 * i + 1] / count) for i, weight in enumerate(weights)}
