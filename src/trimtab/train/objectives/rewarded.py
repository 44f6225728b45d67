"""What objectives of rewards share: they learn from samples of a prompt that are scored, and from no wanted answers.

The samples are drawn while the aligner trains, from what is decoded (`trimtab.train.online`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trimtab.core.rules import Geometric, Mixture, Product
from trimtab.errors import InvalidOption
from trimtab.train.objectives.base import Objective
from trimtab.train.objectives.gains import Gained
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss

__all__ = ["Rewarded"]

TRAINED = (Product, Geometric, Mixture)
"""Rules of which a gradient can be had."""


@dataclass(frozen=True)
class Rewarded(Objective):
    """What learns from rewards."""

    residual: ClassVar[bool] = True
    rewarded: ClassVar[bool] = True

    def settle(self, setting: Setting) -> "Rewarded":
        """Only what has a gradient."""
        if not isinstance(setting.rule, TRAINED):
            raise InvalidOption(f"{self.name} trains product, geometric or mixture, and not '{setting.rule}'")
        return self

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """Those that it trains."""
        return tuple(rule.name for rule in TRAINED)

    def arguments(self, setting: Setting) -> Mapping[str, Any]:
        """The best checkpoint is by the objective. A head's rate and its decay are those of other heads: benchmarks/REWARDS.md.

        A larger aligner has smaller steps, and no decay, which would end before the target; nobody measured that.
        """
        best = {"metric_for_best_model": "eval_objective", "greater_is_better": True}
        return best if setting.head else best | {"learning_rate": 1e-4, "lr_scheduler_type": "constant_with_warmup"}

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """Log P_θ − log P_M of each token."""
        return (Gained(),)

    def gain(self, batch: Batch) -> Tensor:
        """Log P_θ(y|x) − log P_M(y|x) of each sample `[B]`."""
        return batch.sum(batch.tokens(Gained()))
