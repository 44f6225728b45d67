"""`kl_gate`: the aligners where they are near the proposal, and the proposal elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.logprobs import kl_divergence, log_normalize
from trimtab.core.rules.base import Rule, weighted_sum
from trimtab.core.rules.context import Context
from trimtab.errors import InvalidOption

__all__ = ["KLGate"]


@dataclass(frozen=True)
class KLGate(Rule):
    """`nucleus` where KL(p̃‖q) ≤ `tau` nats, otherwise p̃ alone (the official code's default, `par_kl`).

    q is the normalised weighted product Π q_i^λ_i; with one aligner at λ = 1, the aligner itself.
    """

    name: ClassVar[str] = "kl_gate"
    marks: ClassVar[str | None] = "left to the proposal"
    tau: float = 0.1

    def __post_init__(self) -> None:
        """Check `tau`."""
        if not self.tau >= 0:
            raise InvalidOption(f"kl_gate: tau must be at least 0, not {self.tau}")

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Σ λ_i log q_i, or log p̃ where the gate is shut; NaN where an aligner has no distribution, which is no shut gate."""
        logw = weighted_sum(logqs, weights)
        row = torch.where(self.marked(logp, logqs, weights).unsqueeze(-1), logp, logw)
        return torch.where(logw.isnan(), math.nan, row)

    def marked(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Which rows `[...]` are left to the proposal."""
        return ~(kl_divergence(logp, log_normalize(weighted_sum(logqs, weights))) <= self.tau)
