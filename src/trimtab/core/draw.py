"""From a row and uniforms to a token."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LEVELS", "NO_TOKEN", "draw_by_mass", "draw_steadily", "inverse_cdf"]

NO_TOKEN = -1
"""Stands for the token of a row that has none: it is NaN, or −inf throughout."""
LARGE = 16384
"""Tokens from which a vocabulary is summed by stretches, or drawn from level by level."""
STRETCH = 256
LEVELS = 4
"""Uniforms that `draw_steadily` takes."""
BRANCHES = 16
"""Ways to go at each level below the first."""


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


def draw_steadily(mass: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token `[...]` from each row of weights `[..., V]`, so that rounding errors in them hardly ever change it.

    The passes of a model over one token and over five differ in the last digits. An inverse CDF adds those up over all that
    stands before a token, so that all its thousands of thresholds move: with rows of SmolLM2-135M (float32, temperature 1) by
    enough to change .16 % of all tokens. Where a large vocabulary is halved again and again, each time with a uniform of its
    own, an error moves one threshold, by its own size: .0003 %. Four levels, the last three of 16 ways: .0009 %
    (benchmarks/steady_draw.py).

    Args:
        mass: at least 0; it need not sum to 1.
        uniforms: `[..., LEVELS]` float64 in [0, 1). Below `LARGE` tokens the first one alone counts: the inverse CDF at it.

    Returns:
        Tokens; `NO_TOKEN` for a row without mass.
    """
    if mass.shape[-1] < LARGE:
        return draw_by_mass(mass, uniforms[..., :1]).squeeze(-1)
    sums = [F.pad(mass, (0, -mass.shape[-1] % BRANCHES ** (LEVELS - 1)))]
    for _ in range(LEVELS - 1):
        sums.append(_split(sums[-1]).sum(-1, dtype=torch.float64))
    token = draw_by_mass(sums.pop(), uniforms[..., :1]).squeeze(-1)
    dead, token = token == NO_TOKEN, token.clamp(min=0)
    for level in range(1, LEVELS):
        mine = _split(sums.pop()).gather(-2, token[..., None, None].expand(*token.shape, 1, BRANCHES)).squeeze(-2)
        cumulative = mine.cumsum(-1, dtype=torch.float64)
        total = cumulative[..., -1:]
        goal = torch.minimum(uniforms[..., level : level + 1] * total, torch.nextafter(total, torch.zeros_like(total)))
        token = token * BRANCHES + (cumulative <= goal).sum(-1)
    return torch.where(dead, NO_TOKEN, token)


def _split(mass: Tensor) -> Tensor:
    """Neighbours side by side: `[..., V / BRANCHES, BRANCHES]`."""
    return mass.view(*mass.shape[:-1], -1, BRANCHES)


def _first_above(cumulative: Tensor, goal: Tensor) -> Tensor:
    """Where running sums `[..., N]` first exceed each of the goals `[..., D]`; `NO_TOKEN` where they sum to nothing."""
    total = cumulative[..., -1:]
    # Strictly below the total even after rounding, so that the first sum above it exists and belongs to a possible token.
    goal = torch.minimum(goal, torch.nextafter(total, torch.zeros_like(total)))
    return torch.where(_alive(total), torch.searchsorted(cumulative, goal, right=True), NO_TOKEN)


def _alive(mass: Tensor) -> Tensor:
    return (mass > 0) & (mass < torch.inf)  # False for NaN
