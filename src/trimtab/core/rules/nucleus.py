"""`nucleus`: the aligners on the support of the proposal."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from trimtab.core.rules.base import Rule, weighted_sum
from trimtab.core.rules.context import Context
from trimtab.core.transfer import to_device

__all__ = ["Nucleus"]


@dataclass(frozen=True)
class Nucleus(Rule):
    """∝ Π q_i^λ_i on the support of p̃, whose probabilities drop out (the official code's `par`).

    With `force_eos`, a row whose most probable token under p̃ ends the sequence ends it.
    """

    name: ClassVar[str] = "nucleus"
    force_eos: bool = False
    eos_token_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"option": False})

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Σ λ_i log q_i, or all mass on the proposal's best token where that ends the sequence."""
        logw = weighted_sum(logqs, weights)
        if not self.force_eos:
            return logw
        best = logp.argmax(-1, keepdim=True)
        ends = torch.isin(best, to_device(self.eos_token_ids, logp.device))
        is_best = torch.arange(logp.shape[-1], device=logp.device) == best
        return torch.where(ends, torch.where(is_best, 0.0, -math.inf), logw)

    def reads_proposal(self, weights: Sequence[float]) -> bool:
        """Only where a row may be replaced, or where nothing else is weighed."""
        return self.force_eos or not weights

    def is_aligner(self, weights: Sequence[float]) -> bool:
        """At weight 1, where no row may be replaced."""
        return tuple(weights) == (1.0,) and not self.force_eos

    @property
    def weighs_tokens(self) -> bool:
        """Not where a row may be replaced."""
        return not self.force_eos

    def bind(self, eos_token_ids: Sequence[int]) -> Self:
        """This rule with the ids that `force_eos` looks for."""
        return dataclasses.replace(self, eos_token_ids=tuple(eos_token_ids)) if self.force_eos else self
