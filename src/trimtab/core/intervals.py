"""Exact intervals of a share, for a verdict that a handful of votes may have to give.

With k of n the lower end is the p at which k or more have the chance (1 − level) / 2, and the upper end that at which k or
fewer have it (Clopper and Pearson 1934): at least as wide as it should be, at every n and every level, where a bootstrap of few
values, or far out in the tails, is too narrow. Weighted votes count as (Σw)² / Σw² votes (Kish), rounded down to whole ones.
"""

import math
from collections.abc import Callable

__all__ = ["binomial_interval", "sign_interval"]

HALVINGS = 60


def binomial_interval(k: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share of which k of n were seen; from 0 to 1 where n is 0."""
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else _where(lambda p: _at_least(k, n, p) < tail)
    high = 1.0 if k == n else _where(lambda p: _at_least(n - k, n, 1 - p) >= tail)
    return low, high


def sign_interval(won: float, total: float, squares: float, *, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share of weights.

    Args:
        won: the weights that were won; a tie is half of its weight.
        total: all weights, Σw.
        squares: Σw².
        level: coverage.
    """
    n = math.floor(total**2 / squares + 1e-9) if squares > 0 else 0
    share = won / total if total > 0 else 0.5
    low, _ = binomial_interval(math.floor(share * n + 1e-9), n, level=level)
    _, high = binomial_interval(math.ceil(share * n - 1e-9), n, level=level)
    return low, high


def _at_least(k: int, n: int, p: float) -> float:
    """The chance of k or more of n."""
    if p <= 0 or p >= 1:
        return float(k == 0 or p >= 1)
    logs = [_log_choose(n, i) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k, n + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _where(below: Callable[[float], bool]) -> float:
    """Where a property of shares, which small ones have, ends."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
