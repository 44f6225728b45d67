"""`geometric`: interpolation between language models, in log space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.rules.base import Rule, weighted_sum
from trimtab.core.rules.context import Context

__all__ = ["Geometric"]


@dataclass(frozen=True)
class Geometric(Rule):
    """∝ p̃^(1−Σw) · Π q_i^w_i: what an aligner trained as a plain language model wants, for it contains p̃ already."""

    name: ClassVar[str] = "geometric"
    weighs_tokens = True

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """(1 − Σw) log p̃ + Σ w_i log q_i; where p̃ is −inf the caller cuts."""
        return (1.0 - weights.sum(-1, keepdim=True)) * logp + weighted_sum(logqs, weights)

    def reads_proposal(self, weights: Sequence[float]) -> bool:
        """Not where the weights sum to 1, in the precision of any row."""
        return not weights or any(
            float(torch.tensor(weights, dtype=dtype).sum()) != 1 for dtype in (torch.float32, torch.float64)
        )

    def is_aligner(self, weights: Sequence[float]) -> bool:
        """At weight 1."""
        return tuple(weights) == (1.0,)

    def default_weights(self, aligners: int) -> tuple[float, ...]:
        """Equal shares for proposal and aligners."""
        return (1.0 / (aligners + 1),) * aligners
