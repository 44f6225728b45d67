"""From a row and uniforms to a token."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NO_TOKEN", "draw_by_mass", "inverse_cdf"]

NO_TOKEN = -1
"""Stands for the token of a row that has none: it is NaN, or −inf throughout."""
LARGE = 16384
"""Tokens from which a vocabulary is summed by stretches."""
STRETCH = 256


def inverse_cdf(logp: Tensor, uniform: Tensor) -> Tensor:
    """Draw from rows `[..., V]` by inverting their cumulative distribution.

    Args:
        logp: log-probabilities; a token at −inf is never returned.
        uniform: float64 in [0, 1), `[..., D]` for D independent tokens of each row.

    Returns:
        Tokens `[..., D]`; `NO_TOKEN` throughout a row without mass. The sums run in float64.
    """
    return draw_by_mass(logp.exp(), uniform)


def draw_by_mass(mass: Tensor, uniform: Tensor) -> Tensor:
    """`inverse_cdf` for weights `[..., V]`, at least 0, that need not sum to 1.

    A large vocabulary is summed by stretches, and token by token only within the stretch that was drawn: one pass that reads
    the weights, instead of several that write as many float64.
    """
    if mass.shape[-1] < LARGE:
        cumulative = mass.double().cumsum(-1)
        return _first_above(cumulative, uniform * cumulative[..., -1:])
    stretches = F.pad(mass, (0, -mass.shape[-1] % STRETCH)).view(*mass.shape[:-1], -1, STRETCH)
    cumulative = stretches.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = uniform * cumulative[..., -1:]
    stretch = _first_above(cumulative, goal)
    at = stretch.clamp(min=0)
    inside = stretches.gather(-2, at.unsqueeze(-1).expand(*at.shape, STRETCH)).double().cumsum(-1)  # [..., D, STRETCH]
    rest = goal - F.pad(cumulative, (1, 0)).gather(-1, at)
    token = at * STRETCH + _first_above(inside, rest.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(stretch == NO_TOKEN, NO_TOKEN, token)


def _first_above(cumulative: Tensor, goal: Tensor) -> Tensor:
    """Where running sums `[..., N]` first exceed each of the goals `[..., D]`; `NO_TOKEN` where they sum to nothing."""
    total = cumulative[..., -1:]
    # Strictly below the total even after rounding, so that the first sum above it exists and belongs to a possible token.
    goal = torch.minimum(goal, torch.nextafter(total, torch.zeros_like(total)))
    return torch.where(_alive(total), torch.searchsorted(cumulative, goal, right=True), NO_TOKEN)


def _alive(mass: Tensor) -> Tensor:
    return (mass > 0) & (mass < torch.inf)  # False for NaN
