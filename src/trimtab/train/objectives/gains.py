"""What objectives of rewards are made of, token by token: what an aligner adds, what the proposal says, what may be hoped."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.core.rules import Geometric
from trimtab.train.objectives.losses import Decoded
from trimtab.train.objectives.seen import Logits, Rows, TokenLoss
from trimtab.train.rows import CachedRows

__all__ = ["Ending", "Gained", "Proposed", "Valued"]


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
class Ending(TokenLoss):
    """What an aligner adds to the log-probability that the answer ends in a token's place, `Setting.end` being what ends it."""

    reads_proposal: ClassVar[bool] = True

    def of_rows(self, rows: Rows) -> Tensor:
        """See the class."""
        return Gained().of_rows(rows._replace(tokens=_ends(rows)))

    def of_logits(self, logits: Logits) -> Tensor:
        """With `Gained`'s own way."""
        ends = _ends(logits)
        proposal = cache(lambda: CachedRows.whole(logits.proposal().rebuild(logits.vocab_size), ends))
        return Gained().of_logits(logits._replace(tokens=ends, proposal=proposal))


def _ends(seen: Rows | Logits) -> Tensor:
    """The end of sequence in the place of each token."""
    assert seen.setting.end is not None  # as `Objective.prefixes` says
    return torch.full_like(seen.tokens, seen.setting.end)


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
