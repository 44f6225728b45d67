"""What objectives of rewards are made of, token by token: what an aligner adds, what the proposal says, what may be hoped."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.core.rules import Geometric
from trimtab.train.objectives.losses import Decoded
from trimtab.train.objectives.seen import Logits, Rows, TokenLoss

__all__ = ["Gained", "Proposed", "Valued"]


@dataclass(frozen=True)
class Gained(TokenLoss):
    """log of the rule's target − log of the proposal: what an aligner adds to a token's log-probability."""

    reads_proposal: ClassVar[bool] = True

    def of_rows(self, rows: Rows) -> Tensor:
        """See the class."""
        return -Decoded().of_rows(rows) - gather(rows.logp, rows.tokens)

    def of_logits(self, logits: Logits) -> Tensor:
        """With `Decoded`'s own way."""
        return -Decoded().of_logits(logits) - logits.proposal().token_logp


@dataclass(frozen=True)
class Proposed(TokenLoss):
    """log of the proposal: no loss, but what some are made of."""

    reads_proposal: ClassVar[bool] = True

    def of_rows(self, rows: Rows) -> Tensor:
        """See the class."""
        return gather(rows.logp, rows.tokens)

    def of_logits(self, logits: Logits) -> Tensor:
        """As it is kept."""
        return logits.proposal().token_logp


@dataclass(frozen=True)
class Valued(TokenLoss):
    """log of Σ_v p̃(v)·w(v) at a token's place, w being what the aligner's logits, not normalised, multiply the proposal by.

    So logits say two things: how a row is decoded, and what is to be hoped for there (`core.rewards.soft_q`). It is 0 where all
    logits are, as those of a uniform start.
    """

    reads_proposal: ClassVar[bool] = True
    reads_level: ClassVar[bool] = True

    def of_rows(self, rows: Rows) -> Tensor:
        """For rules that are products of powers."""
        rule, weight = rows.setting.rule, rows.setting.weight
        share = 1 - weight if isinstance(rule, Geometric) else 1.0
        assert rows.level is not None  # as `reads_level` says
        return (share * rows.logp + weight * rows.logq).logsumexp(-1) + weight * rows.level
