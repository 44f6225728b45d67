"""A user's weights of a bank of aligners, from a few pairs of answers of which one was preferred.

Of a pair, f_k is by how much more aligner k favours the preferred answer, in nats. With weights λ the answers' log-odds are λ·f
apart, so the preference has the probability σ(β λ·f) of a Bradley-Terry model whose reward is β times them, as in DPO. Users'
weights are spread around λ₀ with the standard deviation s, so the weights given N pairs are at the minimum of

    J(λ) = Σ_n log(1 + e^{−β λ·f_n}) + ‖λ − λ₀‖² / 2s²,

which is strictly convex: there is one, whatever order the pairs come in, and without any it is λ₀. Newton's method finds it in
a few steps. The inverse of the Hessian there is Laplace's approximation of their covariance: the fewer pairs, and the less they
say, the less the weights move and the wider they stay.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["UserWeights", "fit_user_weights"]

STEPS = 100
"""Of Newton's method, by far more than it takes."""

ENOUGH = 1e-20
"""By how much the next step would lower J at most, in nats, at which it is not taken."""

DESCENT = 0.25
"""What a step must reach of what its slope promises; otherwise it is halved."""


class UserWeights(NamedTuple):
    """What is known of a user's weights."""

    mean: Tensor
    """`[K]`: where they are likeliest."""
    covariance: Tensor
    """`[K, K]`: Laplace's approximation."""

    @property
    def deviation(self) -> Tensor:
        """`[K]`: a standard deviation each."""
        return self.covariance.diagonal().sqrt()


def fit_user_weights(features: Tensor, prior: Tensor, beta: float, scale: float, counts: Tensor | None = None) -> UserWeights:
    """The weights that pairs of answers speak for.

    Args:
        features: f `[N, K]` in nats; N may be 0.
        prior: λ₀ `[K]`.
        beta: β, above 0.
        scale: s, above 0.
        counts: how often each pair counts `[N]`; once, where nobody says.

    Returns:
        The weights, in float64 on the CPU.

    Raises:
        ValueError: a number is not finite.
    """
    f = beta * features.double().cpu()
    often = torch.ones(len(f), dtype=torch.float64) if counts is None else counts.double().cpu()
    prior = prior.double().cpu()
    if not bool(f.isfinite().all() and prior.isfinite().all()):
        raise ValueError("features and prior must be finite")
    ridge = torch.eye(len(prior), dtype=torch.float64) / scale**2

    def value(at: Tensor) -> float:
        return float(((at - prior) ** 2).sum() / (2 * scale**2) - (often * logsigmoid(f @ at)).sum())

    def curvature(at: Tensor) -> Tensor:
        chance = torch.sigmoid(f @ at)
        return (f * (often * chance * (1 - chance)).unsqueeze(-1)).T @ f + ridge

    weights, now = prior.clone(), value(prior)
    for _ in range(STEPS):
        slope = (weights - prior) / scale**2 - f.T @ (often * torch.sigmoid(-(f @ weights)))
        step = torch.linalg.solve(curvature(weights), slope)
        promised = float(slope @ step)
        if promised / 2 <= ENOUGH * max(1.0, abs(now)):
            break
        length = 1.0
        while not (then := value(weights - length * step)) <= now - DESCENT * length * promised:
            length /= 2
            if length < math.ulp(1.0):  # rounding is all that is left
                return UserWeights(weights, torch.linalg.inv(curvature(weights)))
        weights, now = weights - length * step, then
    return UserWeights(weights, torch.linalg.inv(curvature(weights)))
