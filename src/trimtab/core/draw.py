"""From a row and uniforms to a token."""

import torch
from torch import Tensor

__all__ = ["NO_TOKEN", "draw_by_mass", "inverse_cdf"]

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
    return draw_by_mass(logp.exp().double(), uniform)


def draw_by_mass(mass: Tensor, uniform: Tensor) -> Tensor:
    """`inverse_cdf` for weights `[..., V]`, float64 and at least 0, that need not sum to 1."""
    cumulative = mass.cumsum(-1)
    total = cumulative[..., -1:]
    # Strictly below the total even after rounding, so that the first sum above it exists and belongs to a possible token.
    goal = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.where(_alive(total), torch.searchsorted(cumulative, goal, right=True), NO_TOKEN)


def _alive(mass: Tensor) -> Tensor:
    return mass > 0  # False for NaN
