"""The shares of a mixture that fit given tokens best: a concave problem, solved to a certified distance from its optimum.

Of tokens t that the components k (the proposal, and each aligner) give the probabilities a_tk, the mixture with shares s has
the mean log-likelihood f(s) = mean_t log Σ_k s_k a_tk, concave on the simplex {s ≥ 0, Σ s = 1}. With its gradient
g_k = mean_t a_tk / Σ_j s_j a_tj,

    Σ_k s_k g_k = 1    and    f(s′) − f(s) ≤ max_k g_k − 1    for any other shares s′,

the latter by concavity. So the *gap* max_k g_k − 1 is 0 at the optimum alone (these are the conditions of Karush, Kuhn and
Tucker), and elsewhere it bounds what is left to gain, in nats a token. At s = (1, 0, …, 0), the proposal alone, g_k is the mean
likelihood ratio of aligner k: some share of it helps exactly if that is above 1.

Newton's method climbs f + μ Σ log s_k for ever smaller μ; where that is highest, the gap is at most μ times the number of
components. Then shares that have come to nothing are set to 0, where the gap says that nothing is lost by it, and Newton's
method without μ takes the rest to where rounding ends.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GAP", "Shares", "best_shares"]

GAP = 1e-9
"""Nats a token by which the shares that are found may miss the best ones."""

SHRINK = 0.1
STEPS = 60
"""Of Newton's method for one μ, by far more than it takes."""

NOTHING = 1e-6
"""Shares below it are tried at 0."""


class Shares(NamedTuple):
    """The best ones."""

    aligners: tuple[float, ...]
    """One for each."""
    loss: float
    """Negative log-likelihood with them, in nats a token."""
    gap: float
    """By at most so much, in nats a token, other shares would be better."""
    tokens: int
    """How many were reckoned with, a token that counts n times as n, rounded."""


def _alone(sums: Tensor) -> Tensor:
    """Sums `[…]` over all processes, where there is one."""
    return sums


def best_shares(
    logp: Tensor, logqs: Sequence[Tensor], total: Callable[[Tensor], Tensor] = _alone, counts: Tensor | None = None
) -> Shares:
    """The shares of `mixture` with which given tokens are likeliest.

    Args:
        logp: log p̃ `[N]` of each token. Those that the proposal cannot say are left out: no share makes them possible.
        logqs: log q `[N]` of each token, for each aligner.
        total: adds up sums over the processes that have parts of the tokens; each gets the same.
        counts: how often each token counts `[N]`; once, where nobody says.

    Returns:
        The shares, with a gap of `GAP` at most, unless no number is nearer. Without any token, 0 for each aligner.
    """
    logs = torch.stack([logp, *logqs], -1).double().cpu()
    often = torch.ones(len(logs), dtype=torch.float64) if counts is None else counts.double().cpu()
    often, logs = often[logs[:, 0] > -torch.inf], logs[logs[:, 0] > -torch.inf]
    top = logs.amax(-1, keepdim=True)
    problem = _Problem((logs - top).exp(), often, (top.squeeze(-1) * often).sum(), total)
    count = logs.shape[1]
    if not problem.tokens:
        return Shares((0.0,) * (count - 1), 0.0, 0.0, 0)
    shares = problem.climb(torch.ones(count, dtype=torch.bool))
    kept = shares >= NOTHING
    if not bool(kept.all()):
        fewer = problem.polish(problem.climb(kept))
        if problem.gap(fewer) <= max(GAP, problem.gap(shares)):
            shares = fewer
    shares = problem.polish(shares)
    loss = -problem.value(shares)
    return Shares(tuple(shares[1:].tolist()), loss, problem.gap(shares), round(problem.tokens))


class _Problem:
    """The mean log-likelihood f, from the probabilities `[N, k]` of this process's tokens, each relative to its best.

    And from how often each counts `[N]`.
    """

    def __init__(self, likely: Tensor, often: Tensor, top: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        self._likely, self._often, self._total = likely, often, total
        self.tokens, self._top = map(float, total(torch.stack([often.sum(), top])))

    def value(self, shares: Tensor) -> float:
        """f, in nats a token."""
        found = float(self._total((self._often * (self._likely @ shares).log()).sum()))
        return (found + self._top) / self.tokens

    def slopes(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient `[k]` and the Hessian `[k, k]` of f."""
        ratios = self._likely / (self._likely @ shares).unsqueeze(-1)
        counted = ratios * self._often[:, None]
        sums = self._total(torch.cat([counted.sum(0, keepdim=True), counted.mT @ ratios])) / self.tokens
        return sums[0], -sums[1:]

    def gap(self, shares: Tensor) -> float:
        """What is left to gain, at most."""
        return max(0.0, float(self.slopes(shares)[0].max()) - 1)

    def climb(self, kept: Tensor) -> Tensor:
        """The best shares `[k]` of the components `[k]` that are kept, and 0 for the others."""
        part = _Problem(self._likely[:, kept], self._often, self._likely.new_tensor(0.0), self._total)
        count = int(kept.sum())
        shares, barrier = torch.full((count,), 1 / count, dtype=torch.float64), 1.0
        while barrier * count > GAP / 4:
            barrier *= SHRINK
            for _ in range(STEPS):
                step, promise = part.step(shares, barrier)
                if promise <= barrier * 1e-6:
                    break
                shares = part.along(shares, step, promise, barrier)
        return torch.zeros(len(kept), dtype=torch.float64).masked_scatter(kept, shares / shares.sum())

    def step(self, shares: Tensor, barrier: float) -> tuple[Tensor, float]:
        """Newton's step `[k]`, which changes no sum, and by how much a quadratic would rise along it, twice."""
        gradient, hessian = self.slopes(shares)
        gradient, hessian = gradient + barrier / shares, hessian - torch.diag(barrier / shares**2)
        ones = torch.ones_like(shares)
        bordered = torch.cat([torch.cat([-hessian, ones[:, None]], 1), torch.cat([ones, ones.new_zeros(1)])[None]])
        goal = torch.cat([gradient - 1, ones.new_zeros(1)])  # the multiplier is near 1, so this loses fewer digits
        step = torch.linalg.lstsq(bordered, goal, driver="gelsd").solution[:-1]  # aligners that are alike make it singular
        return step, float(gradient @ step)

    def polish(self, shares: Tensor) -> Tensor:
        """Those above 0 moved by Newton's steps without a barrier, as long as the gap falls."""
        kept = shares > 0
        part, gap = _Problem(self._likely[:, kept], self._often, self._likely.new_tensor(0.0), self._total), self.gap(shares)
        for _ in range(STEPS):
            step, _ = part.step(shares[kept], 0.0)
            moved = torch.zeros_like(shares).masked_scatter(kept, shares[kept] + step)
            if not bool((moved >= 0).all()) or not self.gap(moved) < gap:
                break
            shares, gap = moved, self.gap(moved)
        return shares

    def along(self, shares: Tensor, step: Tensor, promise: float, barrier: float) -> Tensor:
        """As far along a step as all shares stay above 0 and f, with the barrier, rises as it should."""

        def height(at: Tensor) -> float:
            return self.value(at) + barrier * float(at.log().sum())

        down = step < 0
        length = min(1.0, 0.99 * float((-shares[down] / step[down]).min())) if bool(down.any()) else 1.0
        start = height(shares)
        while length > 1e-12 and not height(shares + length * step) >= start + 1e-4 * length * promise:
            length /= 2
        return shares + length * step if length > 1e-12 else shares
