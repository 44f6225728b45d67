"""Sequential Monte Carlo: the weights of particles, and when and how they are drawn anew.

N *particles* are texts in the making that grow by the token-level law p_t = w_t / Z_t, where w_t(v) is what the decoding rule
gives a token (p̃·q^λ for `product`) and Z_t the sum of a row. A text y is so drawn with Π w_t(y_t) / Π Z_t; with the weight
Π Z_t it counts as one of the *sequence-level* target γ(y) = Π w_t(y_t), which Z = Σ_y γ(y) normalises. The increment Z_t is
known before the token is drawn, so particles are resampled between the two: copies of one go different ways at once.

A run is *properly weighted*: whatever the threshold, E[Ẑ · Σ_i W_i f(y_i)] = Σ_y γ(y) f(y) for every f, with W_i the normalised
weights and Ẑ the estimate of Z, which is therefore unbiased (Del Moral, "Feynman-Kac formulae", 2004). All that this takes of
resampling is that particle i has N·W_i children on average.

All tensors are float64, `[..., N]` for runs of N particles; nothing is written to, and noise is an argument.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.draw import inverse_cdf
from trimtab.core.logprobs import log_normalize

__all__ = [
    "Resampled",
    "Weights",
    "choose",
    "effective_size",
    "estimate_log_z",
    "even_weights",
    "in_place",
    "resample",
    "reweigh",
    "systematic",
]


class Weights(NamedTuple):
    """What runs know of their particles."""

    logw: Tensor
    """`[..., N]` log weights since the last resampling, in nats; −inf for a particle that counts for nothing."""
    log_z: Tensor
    """`[...]` log of what resamplings have divided the weights by."""


class Resampled(NamedTuple):
    """What became of runs' particles."""

    weights: Weights
    ancestors: Tensor
    """`[..., N]` whose copy each particle is now; its own index where it stays."""
    happened: Tensor
    """`[...]` whether the run was resampled."""


def even_weights(runs: int, particles: int) -> Weights:
    """Those of particles that have not begun, `[runs, particles]`."""
    return Weights(torch.zeros(runs, particles, dtype=torch.float64), torch.zeros(runs, dtype=torch.float64))


def reweigh(weights: Weights, increments: Tensor) -> Weights:
    """Multiply by what the next row adds: log Z_t `[..., N]`, 0 for a particle that has ended."""
    return Weights(weights.logw + increments, weights.log_z)


def estimate_log_z(weights: Weights) -> Tensor:
    """The log of the unbiased estimate of Z, `[...]`; −inf where no particle counts."""
    return weights.log_z + weights.logw.logsumexp(-1) - math.log(weights.logw.shape[-1])


def effective_size(logw: Tensor) -> Tensor:
    """(Σ w)² / Σ w², `[...]`: how many equal particles these are worth, from 1 to N; 0 where none counts."""
    size = (2 * logw.logsumexp(-1) - (2 * logw).logsumexp(-1)).exp()
    return torch.where(logw.amax(-1).isneginf(), 0.0, size)


def systematic(logw: Tensor, uniform: Tensor) -> Tensor:
    """N ancestors `[..., N]` in ascending order by one uniform `[...]` in [0, 1): particle i is ⌊N·W_i⌋ or ⌈N·W_i⌉ of them."""
    count = logw.shape[-1]
    points = (uniform.unsqueeze(-1) + torch.arange(count, dtype=torch.float64)) / count
    return inverse_cdf(log_normalize(logw), points)


def in_place(ancestors: Tensor) -> Tensor:
    """The same ancestors `[..., N]` in another order: each of them is its own, and further copies take the other places.

    So what a particle remembers is copied only to where another one dies.
    """
    places = torch.arange(ancestors.shape[-1]).expand_as(ancestors)
    ascending = ancestors.sort(-1).values
    again = torch.cat([torch.zeros_like(ascending[..., :1]), (ascending.diff(dim=-1) == 0).long()], -1)
    firsts_first = ascending.gather(-1, again.argsort(dim=-1, stable=True))
    dies = torch.ones_like(ancestors).scatter_(-1, ancestors, 0)
    survivors_first = places.gather(-1, dies.argsort(dim=-1, stable=True))
    return torch.empty_like(ancestors).scatter_(-1, survivors_first, firsts_first)


def resample(weights: Weights, uniform: Tensor, threshold: float) -> Resampled:
    """Draw the particles of a run anew where their effective size is below `threshold`·N; those drawn weigh the same then.

    Args:
        weights: before.
        uniform: `[...]` one for each run.
        threshold: a share of N: 0 for never, 1 for whenever the weights differ.
    """
    logw, count = weights.logw, weights.logw.shape[-1]
    some = ~logw.amax(-1).isneginf()
    happened = some & (logw.amax(-1) > logw.amin(-1)) & (effective_size(logw) < threshold * count)
    here = happened.unsqueeze(-1)
    own = torch.arange(count).expand_as(logw)
    drawn = torch.where(here, systematic(torch.where(here, logw, 0.0), uniform), own)
    fresh = Weights(torch.zeros_like(logw), estimate_log_z(weights))
    kept = Weights(torch.where(here, fresh.logw, logw), torch.where(happened, fresh.log_z, weights.log_z))
    return Resampled(kept, in_place(drawn), happened)


def choose(logw: Tensor, uniform: Tensor) -> Tensor:
    """One particle of each run, `[...]`, by its weight, with one uniform `[...]`; `NO_TOKEN` where none counts."""
    return inverse_cdf(log_normalize(logw), uniform.unsqueeze(-1)).squeeze(-1)
