"""A gate that is learnt: a logistic regression on what p̃'s row says, and on the place in the answer.

It learns where the rule is better than p̃ on the wanted token, each token weighing as much as the two differ there: so a row's
logit orders rows by how likely they are to be worth a call, nats counted and not tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from gate_rows import ROW, of_row
from torch import Tensor

from trimtab.core.rules import Context, Rule

__all__ = ["LearnedGate", "Logit", "fit"]

RIDGE = 1e-2
"""Of the standardised coefficients, a token: enough for a fit to exist."""
STEPS = 50
"""Of Newton's method."""


@dataclass(frozen=True)
class Logit:
    """What was learnt. Inputs are standardised, `(x − center) / scale`; one that never varied is left as it is.

    Attributes:
        coefficients: one for each input, and the constant.
        center, scale: of each input.
    """

    coefficients: tuple[float, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]

    def __call__(self, of_rows: Sequence[Tensor], position: Tensor) -> Tensor:
        """The logit `[...]` of rows.

        Args:
            of_rows: what each row says, as `of_row` has it.
            position: tokens of the answer before each.
        """
        inputs = _inputs(of_rows, position)
        center, scale, coefficients = (inputs.new_tensor(part) for part in (self.center, self.scale, self.coefficients))
        return (inputs - center) / scale @ coefficients[:-1] + coefficients[-1]


def fit(columns: Mapping[str, Tensor]) -> Logit:
    """Learn from tokens whose gain is known: float64 columns `[N]` of `read_columns`."""
    inputs = _inputs([columns[name] for name in ROW], columns["position"])
    gain = columns["rule"] - columns["proposal"]
    center, spread = inputs.mean(0), inputs.std(0)
    scale = torch.where(spread > 0, spread, 1.0)
    table = torch.cat([(inputs - center) / scale, torch.ones_like(inputs[:, :1])], dim=1)
    weight = gain.abs() / gain.abs().mean()
    ridge = torch.full((table.shape[1],), RIDGE * len(gain), dtype=table.dtype)
    ridge[-1] = 0
    found = torch.zeros_like(ridge)
    for _ in range(STEPS):
        likely = torch.sigmoid(table @ found)
        slope = table.T @ (weight * (likely - (gain > 0).double())) + ridge * found
        curve = (table * (weight * likely * (1 - likely)).unsqueeze(1)).T @ table + ridge.diag()
        found = found - torch.linalg.solve(curve, slope)
    return Logit(*(tuple(part.tolist()) for part in (found, center, scale)))


def _inputs(of_rows: Sequence[Tensor], position: Tensor) -> Tensor:
    """`[..., 25]` in float64: the row's, how late it is, and whether it is the first; then squares, and products of pairs."""
    # A token that p̃ holds for impossible is no more so at −200 nats than at −100.
    row = torch.stack([part.double().clamp(min=-100) for part in of_rows], dim=-1)
    late, first = position.double().log1p().unsqueeze(-1), (position == 0).double().unsqueeze(-1)
    plain = torch.cat([row, late], dim=-1)
    pairs = [plain[..., i:] * plain[..., i : i + 1] for i in range(plain.shape[-1])]
    return torch.cat([plain, first, *pairs, row * first], dim=-1)


@dataclass(frozen=True)
class LearnedGate(Rule):
    """`rule` where the logit is at least `tau`, otherwise p̃ alone; no aligner need be asked where it is not."""

    name: ClassVar[str] = "learned_gate"
    marks: ClassVar[str | None] = "left to the proposal"
    rule: Rule
    logit: Logit
    ends: tuple[int, ...]
    tau: float = -math.inf

    @property
    def looks_back(self) -> bool:
        """For the place in the answer."""
        return True

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """The rule's target, or log p̃."""
        row = self.rule.target(logp, logqs, weights)
        return torch.where(self.marked(logp, logqs, weights, context=context).unsqueeze(-1), logp, row)

    def marked(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Which rows `[...]` are left to the proposal."""
        assert context is not None
        return self.logit(of_row(logp, self.ends), context.position - context.prompt_length) < self.tau
