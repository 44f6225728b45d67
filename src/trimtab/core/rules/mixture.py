"""`mixture`: with some probability an aligner's token, else the proposal's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.logprobs import impossible, is_distribution
from trimtab.core.rules.base import Rule
from trimtab.core.rules.context import Context
from trimtab.errors import InvalidOption

__all__ = ["Mixture"]

ROUNDING = 1e-6
"""By so much the sum of weights may miss 1, as sums of float32 do."""


@dataclass(frozen=True)
class Mixture(Rule):
    """∝ (1 − Σw)·p̃ + Σ w_i q_i on the support of p̃ (Accept-Reject, arXiv 2505.07783): weights are the aligners' shares.

    What an aligner cannot say costs nothing: the others say it. Where p̃ is nowhere 0, the mixture is normalised as it is, and
    the log-likelihood of a text is concave in the weights (`trimtab.core.shares`).
    """

    name: ClassVar[str] = "mixture"
    weighs_tokens = True

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Log of (1 − Σw)·p̃ + Σ w_i q_i; NaN throughout for weights that cannot be, or an aligner that counts and is broken."""
        return _log_mixture([logp, *logqs], torch.cat([_rest(weights), weights], -1))

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """As for every rule; where no aligner has a share, p̃ to the bit."""
        row = super().target(logp, logqs, weights)
        if not logqs:
            return row
        bare = (weights == 0).all(-1, keepdim=True) & is_distribution(logp)
        return torch.where(bare, torch.where(impossible(logp), -math.inf, logp), row)

    def together(self, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Log Σ w_i q_i."""
        return _log_mixture(logqs, weights)

    def check_weights(self, weights: Sequence[float]) -> None:
        """Shares are at least 0, and sum to 1 at most."""
        if (least := min(weights, default=0.0)) < 0:
            raise InvalidOption(
                f"weight must be at least 0 under {self.name}, where it is an aligner's share, not {least:g}: an anti-expert"
                " needs product or geometric"
            )
        if (total := math.fsum(weights)) > 1 + ROUNDING:
            shares = "the aligners' shares sum to" if len(weights) > 1 else "the aligner's share is"
            raise InvalidOption(
                f"weight: under {self.name} {shares} {total:g}, and must be at most 1, for the rest is the proposal's: lower"
                f" {'them' if len(weights) > 1 else 'it'}, or choose another rule"
            )

    def reads_proposal(self, weights: Sequence[float]) -> bool:
        """Not where it has no share, in the precision of any row."""
        return any(bool(_rest(torch.tensor(weights, dtype=dtype)) != 0) for dtype in (torch.float32, torch.float64))

    def is_aligner(self, weights: Sequence[float]) -> bool:
        """At weight 1."""
        return tuple(weights) == (1.0,)

    def default_weights(self, aligners: int) -> tuple[float, ...]:
        """Equal shares for proposal and aligners."""
        return (1.0 / (aligners + 1),) * aligners


def _rest(weights: Tensor) -> Tensor:
    """The proposal's share `[..., 1]`, from the aligners' `[..., n]`."""
    rest = 1.0 - weights.sum(-1, keepdim=True)
    return torch.where((rest < 0) & (rest >= -ROUNDING), 0.0, rest)


def _log_mixture(rows: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Log Σ s_k r_k of rows `[..., V]` with shares `[..., k]`; a row without a share may be anything."""
    parts = [_log_part(row, share) for row, share in zip(rows, torch.split(shares, 1, dim=-1), strict=True)]
    return torch.stack(parts).logsumexp(0)


def _log_part(row: Tensor, share: Tensor) -> Tensor:
    """Log of `share` · row; NaN throughout if the share is below 0, or the row no distribution though it has a share.

    What is impossible takes no gradient: that of a token which nobody can say would be NaN.
    """
    part = torch.where(share == 0, 1.0, share).log() + torch.where(impossible(row), -math.inf, row)
    part = torch.where(is_distribution(row), part, math.nan)
    return torch.where(share == 0, -math.inf, part)
