"""From a row and uniforms to a token."""

import torch
from torch import Tensor

__all__ = ["NO_TOKEN", "greedy", "inverse_cdf"]

NO_TOKEN = -1
"""Stands for the token of a row that has none: it is NaN, or −inf throughout."""


def inverse_cdf(logp: Tensor, uniform: Tensor) -> Tensor:
    """Draw from rows `[..., V]` by inverting their cumulative distribution.

    Args:
        logp: log-probabilities; a token at −inf is never returned.
        uniform: float64 in [0, 1), `[..., D]` for D independent tokens of each row.

    Returns:
        Tokens `[..., D]`; `NO_TOKEN` throughout a row without mass. The sums run in float64.
    """
    cumulative = logp.double().exp().cumsum(-1)
    total = cumulative[..., -1:]
    # Strictly below the total even after rounding, so that the first sum above it exists and belongs to a possible token.
    goal = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.where(_alive(total), torch.searchsorted(cumulative, goal, right=True), NO_TOKEN)


def greedy(logp: Tensor) -> Tensor:
    """The most probable token of rows `[..., V]`, the lowest id among ties; `NO_TOKEN` marks a row without mass."""
    best = logp.amax(-1)
    return torch.where(_alive(best.exp()), logp.argmax(-1), NO_TOKEN)


def _alive(mass: Tensor) -> Tensor:
    return mass > 0  # False for NaN
