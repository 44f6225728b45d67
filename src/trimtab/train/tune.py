"""The weight that fits the development data best: a best λ far below the trained one betrays double counting.

A budget in nats a token bounds how far the aligned model may be from the proposal. KL(aligned‖p̃) grows with the weight, for
`product` (its derivative is λ times the variance of log q under the target) as for `geometric`, and the loss has one best
weight; so where that one is beyond the budget, the largest weight within it is the best.

For `mixture` the best share is not searched but solved for (`trimtab.core.shares`); the divergence is convex in the share and 0
at 0, so it grows, too.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from trimtab.core.rules import Mixture, Rule
from trimtab.core.shares import best_shares
from trimtab.train.ranks import ALONE, Ranks

__all__ = ["CHEAPEST", "RANGES", "Look", "Losses", "Stay", "Tuned", "tune_weight"]

RANGES = {"product": (0.0, 2.0), "geometric": (0.0, 1.0), "mixture": (0.0, 1.0)}
"""Where to look, for the rules whose likelihood, or divergence from a teacher, has one best weight: both are convex in it."""

STEPS = 8

HALVINGS = 3
"""Passes in which a budget's end is looked for, where no grid has been tried: STEPS³ weights in all."""


class Stay(NamedTuple):
    """A weight to stay at."""

    weight: float
    worth: float
    """Nats a token that another one must be better by; infinite where likelihood is no reason to leave it."""


CHEAPEST = Stay(1.0, 0.01)
"""Where a head is decoded without running the proposal's layers a second time."""


class Look(NamedTuple):
    """A piece of the development data, n tokens."""

    at: Callable[[float], tuple[Tensor, Tensor]]
    """From a weight to the tokens' losses `[n]`, such as negative log-likelihoods or divergences from a teacher, and to
    KL(aligned‖p̃) there `[n]`."""
    counts: Tensor
    """How often each token counts `[n]`."""


Losses: TypeAlias = Iterable[Look]
"""All pieces of the development data, or of this process's part."""


class Tuned(NamedTuple):
    """The best weight, and what was tried."""

    weight: float
    tried: list[tuple[float, float]]
    """Every weight tried, with its loss in nats a token, in order."""
    kl: float
    """KL(aligned‖p̃) at the best weight, in nats a token."""
    bound: bool
    """Whether a budget kept a better weight out."""


def tune_weight(
    rule: Rule,
    losses: Callable[[], Losses],
    ranks: Ranks = ALONE,
    max_kl: float | None = None,
    *,
    stay: Stay | None = None,
) -> Tuned:
    """Search the rule's range in two passes, coarse and fine; in a third one, finer, where a budget binds.

    Args:
        rule: `product` or `geometric`; or `mixture`, whose best share two passes find, to within `core.shares.GAP`.
        losses: makes a fresh run through the development data; under `mixture` these are negative log-likelihoods.
        ranks: the processes that have the parts.
        max_kl: no more KL(aligned‖p̃) than that, in nats a token; weight 0, which has none, is always among those tried.
        stay: the weight to stay at; where it is beyond the budget and likelihood is no reason, the nearest one within it.
    """
    low, high = RANGES[rule.name]
    if stay and stay.worth == math.inf and max_kl is None:  # nothing to look for
        found = _means([low, stay.weight], losses(), ranks)
        return Tuned(stay.weight, [(weight, loss) for weight, (loss, _) in found.items()], found[stay.weight][1], False)
    staying = {stay.weight} if stay else set()
    if isinstance(rule, Mixture):
        found = _means(sorted({low, _share(losses(), ranks), high} | staying), losses(), ranks)
        narrowing = HALVINGS
    else:
        step = (high - low) / STEPS
        found = _means(sorted({low + i * step for i in range(STEPS + 1)} | staying), losses(), ranks)
        centre = _best(found, max_kl, stay)
        fine = [centre + i * step / 4 for i in range(-3, 4) if i != 0]
        found |= _means([weight for weight in fine if low <= weight <= high], losses(), ranks)
        narrowing = 1
    best = _best(found, max_kl, stay)
    bound = best != _best(found, None, stay)
    for _ in range(narrowing * bound):  # the budget ends between this weight and the next one
        beyond = min(weight for weight in found if weight > best)
        found |= _means([best + i * (beyond - best) / STEPS for i in range(1, STEPS)], losses(), ranks)
        best = _best(found, max_kl, stay)
    return Tuned(best, [(weight, found[weight][0]) for weight in sorted(found)], found[best][1], bound)


def _share(losses: Losses, ranks: Ranks) -> float:
    """The best share of `mixture`: at 0 the losses are the proposal's, and at 1 the aligner's."""
    found = [torch.zeros(3, 0, dtype=torch.float64)]
    for look in losses:
        both = torch.stack([look.at(weight)[0] for weight in (0.0, 1.0)]).double().cpu()
        found.append(torch.cat([-both, look.counts.double().cpu()[None]]))
    logp, logq, counts = torch.cat(found, -1)
    return best_shares(logp, [logq], ranks.total, counts).aligners[0]


def _best(found: dict[float, tuple[float, float]], max_kl: float | None, stay: Stay | None) -> float:
    allowed = [weight for weight, (_, kl) in found.items() if max_kl is None or weight == 0 or kl <= max_kl]
    best = min(allowed, key=lambda weight: found[weight][0])
    if stay is None:
        return best
    near = min(allowed, key=lambda weight: abs(weight - stay.weight))
    if near == stay.weight:
        return near if found[near][0] <= found[best][0] + stay.worth else best
    return near if stay.worth == math.inf else best


def _means(weights: list[float], losses: Losses, ranks: Ranks) -> dict[float, tuple[float, float]]:
    """By weight, the loss and KL(aligned‖p̃), in nats a token."""
    totals, count = torch.zeros(len(weights), 2, dtype=torch.float64), 0.0
    for look in losses:
        each, often = torch.stack([torch.stack(look.at(weight)).double() for weight in weights]), look.counts.double()
        totals, count = totals + (each * often).sum(-1).cpu(), count + float(often.sum())
    *sums, tokens = ranks.total(torch.cat([totals.flatten(), totals.new_tensor([count])])).tolist()
    means = [total / tokens for total in sums]
    return dict(zip(weights, zip(means[::2], means[1::2], strict=True), strict=True))
