"""θ_0 + Σ_d λ_d (θ_d − θ_0) of one tensor, in float64.

It is summed as (1 − Σ λ_d) θ_0 + Σ λ_d θ_d, and what has the factor 0 is left out: so the weights 0 give θ_0's bits, and one
weight 1 gives those of its θ_d.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["factors", "weighted_sum"]


def factors(weights: Sequence[float]) -> list[float]:
    """What θ_0 and each θ_d is multiplied by."""
    return [math.fsum([1.0, *(-weight for weight in weights)]), *weights]


def weighted_sum(parts: Sequence[Callable[[], Tensor]], by: Sequence[float]) -> Tensor:
    """Σ f·θ in float64, in the order of the parts; no more than one of them is in memory beside the sum.

    Args:
        parts: each gives a tensor.
        by: the factor of each; they are not all 0.
    """
    total: Tensor | None = None
    for part, factor in zip(parts, by, strict=True):
        if factor == 0:
            continue
        term = part().to(torch.float64, copy=True)
        if factor != 1:
            term *= factor
        total = term if total is None else total.add_(term)
    assert total is not None
    return total
