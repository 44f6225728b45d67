"""`subtb`: the balance of `tb` also for everything that samples begin with, for rewards that can be asked of that."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.rewards import subtrajectory_balance
from trimtab.train.objectives.base import OBJECTIVES
from trimtab.train.objectives.gains import Ending, Gained
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss
from trimtab.train.objectives.tb import OffPolicy

__all__ = ["SubtrajectoryBalance"]


@OBJECTIVES.register
@dataclass(frozen=True)
class SubtrajectoryBalance(OffPolicy):
    """The variance of log P_θ(y|x) − log P_M(y|x) − r(x, y)/β over all answers that begin as a prompt's samples do, in nats².

    An answer of T tokens is T answers that end earlier, too. So it learns more of a sample, and above all where to end. The
    reward is asked of each of them.
    """

    name: ClassVar[str] = "subtb"

    @property
    def prefixes(self) -> bool:
        """Always."""
        return True

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """What is added to each token, and to an end in its place."""
        return (Gained(), Ending())

    def loss(self, batch: Batch) -> Tensor:
        """Of a sample, its part of its group's variance."""
        return subtrajectory_balance(
            batch.tokens(Gained()),
            batch.tokens(Ending()),
            batch.prefix_rewards,
            batch.rewards,
            batch.cut,
            batch.beta,
            batch.owner,
            batch.groups,
        )
