"""`product`: the model that RAM trains and decodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.rules.base import Rule, weighted_sum
from trimtab.core.rules.context import Context

__all__ = ["Product"]


@dataclass(frozen=True)
class Product(Rule):
    """∝ p̃ · Π q_i^λ_i: the model that RAM trains and decodes (arXiv 2505.19700, equation 4)."""

    name: ClassVar[str] = "product"
    draft_temperature: ClassVar[float] = 0.75
    weighs_tokens = True

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Log p̃ + Σ λ_i log q_i."""
        return logp + weighted_sum(logqs, weights)
