"""`sft`: the aligner as a language model of the wanted text."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.train.objectives.base import OBJECTIVES, Objective
from trimtab.train.objectives.losses import Alone
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss

__all__ = ["SFT"]


@OBJECTIVES.register
@dataclass(frozen=True)
class SFT(Objective):
    """−log Q(y|x)."""

    name: ClassVar[str] = "sft"

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """Those for aligners that contain what the proposal knows."""
        return ("nucleus", "geometric", "mixture")

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """By the aligner alone."""
        return (Alone(),)

    def loss(self, batch: Batch) -> Tensor:
        """The sum over tokens."""
        return batch.sum(batch.tokens(Alone())) / batch.mean_length
