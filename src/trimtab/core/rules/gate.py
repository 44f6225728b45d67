"""`gate`: a rule where it is called for, and the proposal elsewhere; `kl_gate` and `nudge` are two of its cases."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trimtab.core.logprobs import entropy, kl_divergence, log_normalize
from trimtab.core.rules.base import Rule, unless_broken
from trimtab.core.rules.context import Context
from trimtab.core.rules.nucleus import Nucleus
from trimtab.core.rules.product import Product
from trimtab.errors import InvalidOption

__all__ = ["Gate", "KLGate", "Nudge"]

TAUS = {"kl": 0.1, "entropy": 1.0, "max_p": 0.4}
"""What a gate may go by, and the threshold where nobody says one."""

FIXED = {"option": False}


@dataclass(frozen=True)
class Gate(Rule):
    """`rule` where the gate is open, otherwise p̃ alone.

    by `kl`: open where KL(p̃‖q) ≤ `tau` nats, q being what the aligners say together (`Rule.together`, normalised);
    by `entropy`: open where the entropy of p̃ is at least `tau` nats; by `max_p`: open where every p̃(v) < `tau`.
    With `invert` it is open where it would be shut: `gate(rule=mixture, invert=True)` corrects only past a discrepancy, which
    is the second form of Accept-Reject (arXiv 2505.07783).

    Raises:
        InvalidOption: a setting is wrong, or the rule has no row.
    """

    name: ClassVar[str] = "gate"
    marks: ClassVar[str | None] = "left to the proposal"
    rule: Rule = Product()  # noqa: RUF009 - a value
    by: str = "kl"
    tau: float = math.nan
    """NaN stands for the default of `by`."""
    invert: bool = False

    def __post_init__(self) -> None:
        """Check the settings, and fill in `tau`."""
        super().__post_init__()
        if not self.rule.has_row:
            raise InvalidOption(f"{self.name}: rule '{self.rule}' has no row in closed form: choose another, such as product")
        if self.rule.hands_over:
            example = "confidence(before=gate(by=entropy))"
            raise InvalidOption(
                f"{self.name}: rule '{self.rule}' hands over, which a gate would hide: put gates into it, {example}"
            )
        if self.by not in TAUS:
            raise InvalidOption(f"{self.name}: by must be one of {', '.join(TAUS)}, not '{self.by}'")
        if math.isnan(self.tau):
            object.__setattr__(self, "tau", TAUS[self.by])
        if not self.tau >= 0:
            raise InvalidOption(f"{self.name}: tau must be at least 0, not {self.tau}")
        if self.by == "max_p" and self.tau > 1:
            raise InvalidOption(f"{self.name}: tau is a probability by max_p: it must be from 0 to 1, not {self.tau}")

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """The rule's target, or log p̃ where the gate is shut; NaN where an aligner is broken, which is no shut gate."""
        row = self.rule.target(logp, logqs, weights, **self.rule.seen(context))
        row = torch.where(self.marked(logp, logqs, weights, context=context).unsqueeze(-1), logp, row)
        return unless_broken(row, logqs, weights)

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """As for every rule; where the gate is shut, p̃ to the bit, and elsewhere the rule's target to the bit."""
        return self._cut(logp, logqs, weights, context) if logqs else logp

    def marked(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Which rows `[...]` are left to the proposal."""
        if self.by == "kl":
            opens = kl_divergence(logp, log_normalize(self.together(logqs, weights))) <= self.tau
        elif self.by == "entropy":
            opens = entropy(logp) >= self.tau
        else:
            opens = logp.amax(-1).exp() < self.tau
        return opens if self.invert else ~opens

    @property
    def opens_by_proposal(self) -> bool:
        """Whether p̃ alone says if the gate is open, so that no aligner need be asked while it is shut."""
        return self.by != "kl"

    def together(self, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """As the rule has it."""
        return self.rule.together(logqs, weights)

    def check_weights(self, weights: Sequence[float]) -> None:
        """As the rule has it."""
        self.rule.check_weights(weights)

    def default_weights(self, aligners: int) -> tuple[float, ...]:
        """The rule's."""
        return self.rule.default_weights(aligners)

    def bind(self, eos_token_ids: Sequence[int]) -> Self:
        """A gate around the bound rule."""
        bound = self.rule.bind(eos_token_ids)
        return self if bound == self.rule else dataclasses.replace(self, rule=bound)

    # ---- what the rule looks at

    @property
    def window(self) -> int:
        """The rule's."""
        return self.rule.window

    @property
    def reads_logp(self) -> bool:
        """As the rule does."""
        return self.rule.reads_logp

    @property
    def state_size(self) -> int:
        """The rule's."""
        return self.rule.state_size

    @property
    def looks_back(self) -> bool:
        """As the rule does."""
        return self.rule.looks_back

    def initial_state(self) -> Sequence[float]:
        """The rule's."""
        return self.rule.initial_state()

    def advance(self, context: Context, tokens: Tensor, logp: Tensor) -> Tensor:
        """The rule's state, which goes on whether the gate is open or shut."""
        return self.rule.advance(context, tokens, logp)

    def _has_default(self, field: "dataclasses.Field[Any]") -> bool:
        return self.tau == TAUS[self.by] if field.name == "tau" else super()._has_default(field)


@dataclass(frozen=True)
class KLGate(Gate):
    """`nucleus` where KL(p̃‖q) ≤ `tau` nats, otherwise p̃ alone (the official code's default, `par_kl`).

    q is the normalised weighted product Π q_i^λ_i; with one aligner at λ = 1, the aligner itself.
    """

    name: ClassVar[str] = "kl_gate"
    rule: Rule = dataclasses.field(default=Nucleus(), init=False, repr=False, metadata=FIXED)
    by: str = dataclasses.field(default="kl", init=False, repr=False, metadata=FIXED)
    tau: float = TAUS["kl"]
    invert: bool = dataclasses.field(default=False, init=False, repr=False, metadata=FIXED)


@dataclass(frozen=True)
class Nudge(Gate):
    """`nucleus` where every p̃(v) < `tau`, which is where the proposal is unsure, otherwise p̃ alone.

    With one aligner at λ = 1 that is Nudging (arXiv 2410.09300), token by token and on the support of p̃.
    """

    name: ClassVar[str] = "nudge"
    rule: Rule = dataclasses.field(default=Nucleus(), init=False, repr=False, metadata=FIXED)
    by: str = dataclasses.field(default="max_p", init=False, repr=False, metadata=FIXED)
    tau: float = TAUS["max_p"]
    invert: bool = dataclasses.field(default=False, init=False, repr=False, metadata=FIXED)
