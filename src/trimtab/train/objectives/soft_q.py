"""`soft_q`: soft Bellman residuals, a second estimator of the target of `tb`, one answer at a time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.rewards import soft_q
from trimtab.core.rules import Geometric, Product
from trimtab.errors import InvalidOption
from trimtab.options import option
from trimtab.train.objectives.base import OBJECTIVES
from trimtab.train.objectives.gains import Gained, Valued
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss
from trimtab.train.objectives.tb import OffPolicy

__all__ = ["SoftQ"]


@OBJECTIVES.register
@dataclass(frozen=True)
class SoftQ(OffPolicy):
    """Σ_t (g_t + V_t − r_t/β − V_{t+1})² in nats², g_t = log P_θ − log P_M of a token, V 0 at the end (ETPO, arXiv 2402.06700).

    V_t is what the aligner's logits at that place add up to, so no other model learns it. What follows a token is certain;
    so the gradient goes through both values without bias, and no slowly moving copy is kept. A head's logits are read out by
    the proposal's own layer, which is frozen, and do not rise together: it cannot say a value.
    """

    name: ClassVar[str] = "soft_q"

    prefix_rewards: bool = option(
        False,
        "also ask what each answer would be worth if it ended before its next token, so that its reward comes in steps: a"
        " question to --reward for every token",
    )

    @property
    def prefixes(self) -> bool:
        """As is asked for."""
        return self.prefix_rewards

    def settle(self, setting: Setting) -> "SoftQ":
        """Under `mixture` there are no powers, and a head has no values."""
        if setting.head:
            raise InvalidOption("soft_q: a head's frozen output layer cannot say a value: take tb, or an --aligner")
        if not isinstance(setting.rule, (Product, Geometric)):
            raise InvalidOption(f"soft_q trains product or geometric, and not '{setting.rule}'")
        return self

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """Those that it trains."""
        return ("product", "geometric")

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """Gains and values."""
        return (Gained(), Valued())

    def loss(self, batch: Batch) -> Tensor:
        """Of a sample, the sum over its tokens."""
        gains, values = batch.tokens(Gained()), batch.tokens(Valued())
        ends, rewards = batch.ends(), batch.of_tokens(batch.rewards)
        if self.prefix_rewards:  # a step's reward is by how much it changes what the answer would be worth
            now = batch.prefix_rewards.nan_to_num()
            steps = torch.where(ends, rewards, now.roll(-1)) - now
        else:
            steps = torch.where(ends, rewards, torch.zeros_like(rewards))
        steps = (steps / batch.of_tokens(batch.beta)).to(gains.dtype)
        return batch.sum(soft_q(gains, values, values.roll(-1), steps, ends))
