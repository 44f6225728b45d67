"""When enough has drifted: a one-sided CUSUM on losses, with a stated rate of false alarms whatever law the losses have.

    S_t = max(0, S_{t−1} + z_t − 1/2),    an alarm where S_t is above h                       (Page 1954; arXiv 2210.08349)

z_t is where a loss x_t stands among a reference of n losses, of the time when all was well: √12 (r_t / (n + 1) − 1/2), with r_t
one half more than the number of reference losses below it (an equal one is half). Without a drift its mean is 0, its deviation
about 1, and its law does not depend on that of the losses, for ranks of exchangeable numbers do not. So h, the quantile of
max_t S_t over simulated streams, is right for losses of any law and for a reference of any size, however skewed or short.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.noise import uniforms

__all__ = ["STREAMS", "Limit", "cusum", "limit_of", "standing"]

SLACK = 0.5
"""What each step may exceed 0 by: quickest for a drift of about one deviation."""

STREAMS = 2000
"""Simulated ones."""

CHUNK = 2**22
"""Most numbers drawn at once."""


class Limit(NamedTuple):
    """What a stream is watched with."""

    height: float
    """h."""
    false_alarms: float
    """The rate that a second simulation found."""


def cusum(z: Tensor) -> Tensor:
    """S `[…, T]` of steps `[…, T]`: the sum of z − 1/2 above the lowest that it ever was, or 0."""
    total = (z - SLACK).cumsum(-1)
    return total - total.cummin(-1).values.clamp(max=0.0)


def standing(losses: Tensor, reference: Tensor) -> Tensor:
    """Where losses `[…, T]` stand among reference ones `[…, n]`: z `[…, T]`, from about −√3 to √3."""
    ordered = reference.sort(-1).values
    below, within = (torch.searchsorted(ordered, losses.contiguous(), right=right) for right in (False, True))
    rank = (below + within).double() / 2 + 0.5
    return math.sqrt(12) * (rank / (reference.shape[-1] + 1) - 0.5)


def limit_of(count: int, least: int, most: int, false_alarms: float, seed: int = 0) -> Limit:
    """The limit that a stream without a drift passes with a given probability between its `least`-th and `most`-th loss.

    Args:
        count: losses of the reference, from 1 on.
        least: the first loss at which an alarm may be raised, from 1 on.
        most: the last one.
        false_alarms: the probability.
        seed: of the simulation.
    """
    height = float(_highest(count, least, most, seed).quantile(1 - false_alarms))
    again = _highest(count, least, most, seed + 1)
    return Limit(height, float((again > height).double().mean()))


def _highest(count: int, least: int, most: int, seed: int) -> Tensor:
    """The largest S between two places in each of the simulated streams `[STREAMS]`."""
    width = count + most
    highest, rows = [], max(1, CHUNK // width)
    for start in range(0, STREAMS, rows):
        drawn = uniforms([seed], [0], [start], min(rows, STREAMS - start), width)[0]
        highest.append(cusum(standing(drawn[:, count:], drawn[:, :count]))[:, least - 1 :].amax(-1))
    return torch.cat(highest)
