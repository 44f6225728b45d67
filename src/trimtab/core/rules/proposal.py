"""`proposal`: the proposal alone, for rules that are made of others, such as `confidence`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.rules.base import Rule, unless_broken
from trimtab.core.rules.context import Context

__all__ = ["Proposal"]


@dataclass(frozen=True)
class Proposal(Rule):
    """p̃, whatever the aligners say; one that is broken is an error here, too."""

    name: ClassVar[str] = "proposal"

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Log p̃."""
        return unless_broken(logp, logqs, weights)

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """P̃ to the bit."""
        return self._cut(logp, logqs, weights, context) if logqs else logp
