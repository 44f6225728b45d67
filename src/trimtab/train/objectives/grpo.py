"""`grpo`: a group-relative policy gradient on what is decoded, with a price on its divergence from the proposal."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.rewards import advantages, reverse_kl
from trimtab.options import option
from trimtab.train.objectives.base import OBJECTIVES
from trimtab.train.objectives.gains import Gained
from trimtab.train.objectives.rewarded import Rewarded
from trimtab.train.objectives.seen import Batch

__all__ = ["GroupRelativePolicy"]

LOSS_TYPES = ("dapo", "grpo")


@OBJECTIVES.register
@dataclass(frozen=True)
class GroupRelativePolicy(Rewarded):
    """−A·log P_θ + β·KL of each token, A the reward minus its group's mean (arXiv 2402.03300; UniR, 2505.19075).

    Options are called as in TRL's `GRPOConfig`. Every sample is of the policy that it trains, and is used once, so the ratio of
    old and new policy is 1 and nothing is clipped.
    """

    name: ClassVar[str] = "grpo"

    beta: float = option(0.04, "weight of KL(aligned‖proposal), in nats a token", low=0)
    scale_rewards: bool = option(True, "divide rewards by their standard deviation over a prompt's samples")
    loss_type: str = option(
        "dapo",
        "what tokens are averaged over: 'dapo' all of an update, 'grpo' those of an answer, so that long ones count for less",
        choices=LOSS_TYPES,
    )

    def loss(self, batch: Batch) -> Tensor:
        """The gradient of −A·log P_θ is that of −A·e^(log P_θ − the same, held fixed)."""
        gains = batch.tokens(Gained())
        ratio = (gains - gains.detach()).exp()
        wanted = advantages(batch.rewards, batch.groups, scale=self.scale_rewards).to(gains.dtype)
        each = -batch.of_tokens(wanted) * ratio + batch.of_tokens(batch.beta) * reverse_kl(gains)
        lengths = batch.sum(torch.ones_like(gains))
        return batch.sum(each) / (lengths if self.loss_type == "grpo" else batch.mean_length)
