"""`candidates`: a sampler without a row in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN, inverse_cdf
from trimtab.core.logprobs import log_normalize
from trimtab.core.rules.base import Rule, weighted_sum
from trimtab.core.rules.context import Context
from trimtab.errors import InvalidOption

__all__ = ["MAX_CANDIDATES", "Candidates"]

MAX_CANDIDATES = 65536
"""Beyond that, `product` is the same law for a fraction of the cost."""


@dataclass(frozen=True)
class Candidates(Rule):
    """Draw `n` tokens independently from p̃, weight each by Π q_i^λ_i, draw one: the paper's Propose–Align–Reduce.

    n = 1 is p̃; the law approaches `product` as n grows. A token drawn twice counts twice: without that, the law would
    approach q instead. There is no row in closed form, so this rule samples and cannot score.
    """

    name: ClassVar[str] = "candidates"
    has_row: ClassVar[bool] = False
    n: int = 16

    def __post_init__(self) -> None:
        """Check `n`."""
        super().__post_init__()
        if not 1 <= self.n <= MAX_CANDIDATES:
            raise InvalidOption(f"candidates: n must be from 1 to {MAX_CANDIDATES}, not {self.n}")

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Refuse: there is no such row."""
        raise InvalidOption("rule 'candidates' has no next-token row in closed form: it can sample, but not score")

    @property
    def draws(self) -> int:
        """One uniform for each candidate, and one to choose among them."""
        return self.n + 1

    def sample(
        self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, uniforms: Tensor, *, context: Context | None = None
    ) -> Tensor:
        """Propose n candidates, align their weights, reduce to one."""
        drawn = inverse_cdf(logp, uniforms[..., : self.n])
        if not logqs:
            return drawn[..., 0]
        at_drawn = weighted_sum(logqs, weights).gather(-1, drawn.clamp(min=0))
        choice = inverse_cdf(log_normalize(at_drawn), uniforms[..., self.n :])
        dead = (drawn == NO_TOKEN).any(-1) | (choice == NO_TOKEN).any(-1)
        return torch.where(dead, NO_TOKEN, drawn.gather(-1, choice.clamp(min=0)).squeeze(-1))
