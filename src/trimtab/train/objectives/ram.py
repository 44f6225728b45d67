"""`ram`: the paper's loss, from wanted answers and draws of the proposal (arXiv 2505.19700, equation 7)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.objectives import ram
from trimtab.options import option
from trimtab.train.objectives.base import OBJECTIVES, EqualPairs, Objective
from trimtab.train.objectives.losses import Alone
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss

__all__ = ["RAM"]


@OBJECTIVES.register
@dataclass(frozen=True)
class RAM(Objective):
    """−log Q(y|x) + α·log Q(y'|x), y' drawn from the proposal.

    A pair of two equal answers is taken like any other: the unwanted ones are draws from the proposal, and to leave out those
    that are right would bias their mean.
    """

    name: ClassVar[str] = "ram"
    equal_pairs: ClassVar[EqualPairs] = EqualPairs("kept, as draws like any other", needed=False)

    alpha: float = option(1e-4, "weight of the proposal's samples", low=0)

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """Those that weigh what the proposal says by Q."""
        return ("product", "candidates", "nucleus")

    @property
    def answers(self) -> tuple[str, ...]:
        """Both, unless the samples weigh nothing."""
        return ("chosen", "rejected") if self.alpha else ("chosen",)

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """By the aligner alone."""
        return (Alone(),)

    def loss(self, batch: Batch) -> Tensor:
        """From the sums over tokens."""
        wanted = batch.sum(batch.tokens(Alone()))
        if not self.alpha:
            return wanted / batch.mean_length
        sampled = batch.sum(batch.tokens(Alone(), "rejected"), "rejected")
        return ram(-wanted, -sampled, self.alpha) / batch.mean_length
