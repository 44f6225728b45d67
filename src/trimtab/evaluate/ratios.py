"""Whether a share of an aligner would help: its mean likelihood ratio on held-out tokens, and the best shares of `mixture`.

With a share w of an aligner, `mixture` gives a token the log-probability log((1−w)·p̃ + w·q). The slope of its mean at w = 0 is
E[q/p̃] − 1, and the mean is concave in w. So on these tokens a small share of an aligner improves the likelihood exactly if its
mean ratio is above 1, and if it is below, no share does.

Where p̃ is cut, by `proposal_top_p` say, the mixture is cut and divided by what is left, 1 − w·q(outside): the slope then is
E[q/p̃ + q(outside)] − 1. So that is the ratio that is reported, and where nothing is cut it is the plain one. A token that p̃
cannot say is impossible at every share, and so has no part in it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.shares import best_shares
from trimtab.decode.scoring import Score
from trimtab.evaluate.intervals import ratio_interval

__all__ = ["Ratios"]


class Ratios:
    """Of scores, which are added one after the other.

    Args:
        aligners: how many there are, at least one.
        solves: whether the best shares are asked for; then all tokens are kept.
    """

    def __init__(self, aligners: int, *, solves: bool) -> None:
        self._aligners, self._solves = aligners, solves
        self._sums: list[Tensor] = []
        self._sizes: list[int] = []
        self._outside, self._is_cut = 0, False
        self._tokens: list[Tensor] = []

    def add(self, score: Score) -> None:
        """One completion's score."""
        logs, outside = (torch.tensor(columns, dtype=torch.float64) for columns in (score.inputs, score.outside))
        inside = logs[0] > -math.inf
        self._outside += int((~inside).sum())
        self._is_cut |= bool((outside > 0).any())
        ratios = (logs[1:] - logs[0]).exp() + outside
        self._sums.append(ratios[:, inside].sum(-1))
        self._sizes.append(int(inside.sum()))
        if self._solves:
            self._tokens.append(logs[:, inside])

    def report(self) -> dict[str, Any]:
        """What came of them.

        Returns:
            `likelihood_ratio` and `likelihood_ratio_interval`, a 95 % bootstrap interval over the sequences: lists if there are
            several aligners; None where no number can be given. `outside_support`: how many tokens p̃ cannot say. If the shares
            are asked for, `best_shares`: None where p̃ is cut, for then the problem is not concave; otherwise their `weight`,
            the mean negative log-likelihood of the tokens with them, `nll`, and `gap`, by how much others might be better.
        """
        sums, sizes = torch.stack(self._sums, -1), torch.tensor(self._sizes)
        ratios = [_finite(float(column.sum() / sizes.sum())) if int(sizes.sum()) else None for column in sums]
        intervals = [_interval(column, sizes) for column in sums]
        report: dict[str, Any] = {
            "likelihood_ratio": _one(ratios),
            "likelihood_ratio_interval": _one(intervals),
            "outside_support": self._outside,
        }
        if self._solves:
            report["best_shares"] = None if self._is_cut else self._solve()
        return report

    def _solve(self) -> dict[str, Any]:
        logp, *logqs = torch.cat(self._tokens, -1)
        found = best_shares(logp, logqs)
        return {"weight": _one(found.aligners), "nll": found.loss, "gap": found.gap}


def _one(figures: Sequence[Any]) -> Any:
    """The only one, or all."""
    return figures[0] if len(figures) == 1 else list(figures)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _interval(totals: Tensor, sizes: Tensor) -> list[float] | None:
    some = sizes > 0
    if int(some.sum()) < 2 or not bool(totals.isfinite().all()):
        return None
    return list(ratio_interval(totals[some], sizes[some]))
