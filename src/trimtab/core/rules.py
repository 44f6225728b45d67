"""Decoding rules: how the proposal's row and the aligners' rows become the row that is decoded.

A rule is a frozen value. `rule(logp, logqs, weights)` maps the proposal's row log p̃ and the rows log q_1 … log q_n, each
`[..., V]`, to the normalised target row `[..., V]`. It is pure, works on any number of leading dimensions row by row, never
writes to its arguments, and never gives mass to a token outside the proposal's support. Weights are λ_1 … λ_n; a negative
one makes its aligner an anti-expert, and 0 removes it, whatever that aligner says. What q^λ is where q is 0, `log_power` says.

    product     ∝ p̃ · Π q_i^λ_i                          the Residual Alignment Model, arXiv 2505.19700
    geometric   ∝ p̃^(1−Σw) · Π q_i^w_i                   interpolation between language models
    nucleus     ∝ Π q_i^λ_i on the support of p̃          the official code's `par`
    kl_gate     `nucleus` where KL(p̃‖q) ≤ τ, else p̃      the official code's `par_kl`
    candidates  draw n from p̃, weight by Π q_i^λ_i, draw one of them: a sampler, without a row in closed form

To add a rule, write a frozen dataclass below with a `name` and `log_weights`, and put `@register` above it: the registry makes
it known to `AlignedModel`, manifests and every `--rule` option, and `tests/core/test_rules.py` runs its contract over it.
"""

import ast
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN, inverse_cdf
from trimtab.core.logprobs import impossible, is_distribution, kl_divergence, log_normalize
from trimtab.core.transfer import to_device
from trimtab.errors import DeadRow, InvalidOption

__all__ = [
    "RULES",
    "Candidates",
    "Geometric",
    "KLGate",
    "Nucleus",
    "Product",
    "Rule",
    "log_power",
    "parse_rule",
    "register",
    "weighted_sum",
]


@dataclass(frozen=True)
class Rule:
    """What every rule has in common. Instances are values: equal settings are equal rules."""

    name: ClassVar[str]
    has_row: ClassVar[bool] = True
    """Whether the next-token distribution has a closed form, so that it can be scored, enumerated and verified."""
    draft_temperature: ClassVar[float] = 1.0
    """The temperature at which an aligner drafts best for this rule, as a rule of thumb."""

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The target up to a factor, `[..., V]`, from rows `[..., V]` and weights `[..., n]`; the support is cut for you."""
        raise NotImplementedError

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The normalised target row `[..., V]`, never waiting for the device: a row without mass comes out as NaN.

        Args:
            logp: the proposal's rows log p̃.
            logqs: one tensor of rows for each aligner.
            weights: `[..., n]`, one weight for each aligner; the leading dimensions broadcast with those of the rows.
        """
        if not logqs:
            return logp
        return log_normalize(self._cut(logp, logqs, weights))

    def log_z(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Log of the mass `[...]` by which `target` divides, in nats; −inf for a row without mass. Arguments as for `target`.

        For `product` log Σ_v p̃(v) Π q_i(v)^λ_i, for `nucleus` at λ = 1 the log of the aligner's mass on the support of p̃. It
        means something only where the rule `weighs_tokens`: a gate, or a row that may be replaced, mixes two normalisers.
        """
        return self._cut(logp, logqs, weights).logsumexp(-1)

    def _cut(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """`log_weights` on the support of p̃; NaN where p̃ is no distribution, which must not pass unnoticed."""
        logw = torch.where(impossible(logp), -math.inf, self.log_weights(logp, logqs, weights))
        return torch.where(is_distribution(logp), logw, math.nan)

    def __call__(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor | Sequence[float]) -> Tensor:
        """`target`, with weights as numbers if you like, and with an error for a row that has no mass.

        Raises:
            DeadRow: some row is −inf throughout, or has NaN or +inf, or the rows of a place share no support.
        """
        weights = torch.as_tensor(weights, dtype=logp.dtype, device=logp.device)
        row = self.target(logp, logqs, weights)
        if not bool(is_distribution(row).all()):
            raise DeadRow(f"rule '{self}' leaves no token with any probability: the rows share no support, or are NaN")
        return row

    def sample(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, uniforms: Tensor) -> Tensor:
        """Draw tokens `[...]` from rows `[..., V]` with `uniforms` `[..., draws]`; `NO_TOKEN` where none is possible."""
        return inverse_cdf(self.target(logp, logqs, weights), uniforms[..., :1]).squeeze(-1)

    @property
    def draws(self) -> int:
        """How many uniforms `sample` takes."""
        return 1

    @property
    def weighs_tokens(self) -> bool:
        """Whether `log_weights` looks at one token at a time, so that a row's log Z can be had from any of its tokens."""
        return False

    def reads_proposal(self, weights: Sequence[float]) -> bool:
        """Whether the target at these weights depends on p̃ beyond its support."""
        return True

    def is_aligner(self, weights: Sequence[float]) -> bool:
        """Whether the target at these weights is the only aligner's row, where p̃ holds no token for impossible."""
        return False

    def default_weights(self, aligners: int) -> tuple[float, ...]:
        """The weights of so many aligners when nobody says otherwise."""
        return (1.0,) * aligners

    def bind(self, eos_token_ids: Sequence[int]) -> Self:
        """This rule for a model with these end-of-sequence ids; only rules that treat them specially change."""
        return self

    def __str__(self) -> str:
        """The rule as `parse_rule` reads it: its name, and those of its settings that are not the defaults."""
        shown = [f for f in dataclasses.fields(self) if f.metadata.get("option", True)]
        given = [f"{f.name}={getattr(self, f.name)}" for f in shown if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(given)})" if given else self.name


MAX_CANDIDATES = 65536
"""Beyond that, `product` is the same law for a fraction of the cost."""

MAX_TEXT = 200
"""Characters that any rule with its settings fits in."""

RULES: dict[str, type[Rule]] = {}
"""Every rule by its name."""

_R = TypeVar("_R", bound=type[Rule])


def register(rule: _R) -> _R:
    """Class decorator that puts a rule into `RULES`."""
    RULES[rule.name] = rule
    return rule


@register
@dataclass(frozen=True)
class Product(Rule):
    """∝ p̃ · Π q_i^λ_i: the model that RAM trains and decodes (arXiv 2505.19700, equation 4)."""

    name: ClassVar[str] = "product"
    draft_temperature: ClassVar[float] = 0.75
    weighs_tokens = True

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Log p̃ + Σ λ_i log q_i."""
        return logp + weighted_sum(logqs, weights)


@register
@dataclass(frozen=True)
class Geometric(Rule):
    """∝ p̃^(1−Σw) · Π q_i^w_i: what an aligner trained as a plain language model wants, for it contains p̃ already."""

    name: ClassVar[str] = "geometric"
    weighs_tokens = True

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """(1 − Σw) log p̃ + Σ w_i log q_i; where p̃ is −inf the caller cuts."""
        return (1.0 - weights.sum(-1, keepdim=True)) * logp + weighted_sum(logqs, weights)

    def reads_proposal(self, weights: Sequence[float]) -> bool:
        """Not where the weights sum to 1, in the precision of any row."""
        return not weights or any(
            float(torch.tensor(weights, dtype=dtype).sum()) != 1 for dtype in (torch.float32, torch.float64)
        )

    def is_aligner(self, weights: Sequence[float]) -> bool:
        """At weight 1."""
        return tuple(weights) == (1.0,)

    def default_weights(self, aligners: int) -> tuple[float, ...]:
        """Equal shares for proposal and aligners."""
        return (1.0 / (aligners + 1),) * aligners


@register
@dataclass(frozen=True)
class Nucleus(Rule):
    """∝ Π q_i^λ_i on the support of p̃, whose probabilities drop out (the official code's `par`).

    With `force_eos`, a row whose most probable token under p̃ ends the sequence ends it.
    """

    name: ClassVar[str] = "nucleus"
    force_eos: bool = False
    eos_token_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"option": False})

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Σ λ_i log q_i, or all mass on the proposal's best token where that ends the sequence."""
        logw = weighted_sum(logqs, weights)
        if not self.force_eos:
            return logw
        best = logp.argmax(-1, keepdim=True)
        ends = torch.isin(best, to_device(self.eos_token_ids, logp.device))
        is_best = torch.arange(logp.shape[-1], device=logp.device) == best
        return torch.where(ends, torch.where(is_best, 0.0, -math.inf), logw)

    def reads_proposal(self, weights: Sequence[float]) -> bool:
        """Only where a row may be replaced, or where nothing else is weighed."""
        return self.force_eos or not weights

    def is_aligner(self, weights: Sequence[float]) -> bool:
        """At weight 1, where no row may be replaced."""
        return tuple(weights) == (1.0,) and not self.force_eos

    @property
    def weighs_tokens(self) -> bool:
        """Not where a row may be replaced."""
        return not self.force_eos

    def bind(self, eos_token_ids: Sequence[int]) -> Self:
        """This rule with the ids that `force_eos` looks for."""
        return dataclasses.replace(self, eos_token_ids=tuple(eos_token_ids)) if self.force_eos else self


@register
@dataclass(frozen=True)
class KLGate(Rule):
    """`nucleus` where KL(p̃‖q) ≤ `tau` nats, otherwise p̃ alone (the official code's default, `par_kl`).

    q is the normalised weighted product Π q_i^λ_i; with one aligner at λ = 1, the aligner itself.
    """

    name: ClassVar[str] = "kl_gate"
    tau: float = 0.1

    def __post_init__(self) -> None:
        """Check `tau`."""
        if not self.tau >= 0:
            raise InvalidOption(f"kl_gate: tau must be at least 0, not {self.tau}")

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Σ λ_i log q_i, or log p̃ where the gate is shut; NaN where an aligner has no distribution, which is no shut gate."""
        logw = weighted_sum(logqs, weights)
        row = torch.where(self.falls_back(logp, logqs, weights).unsqueeze(-1), logp, logw)
        return torch.where(logw.isnan(), math.nan, row)

    def falls_back(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Which rows `[...]` are left to the proposal."""
        return ~(kl_divergence(logp, log_normalize(weighted_sum(logqs, weights))) <= self.tau)


@register
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
        if not 1 <= self.n <= MAX_CANDIDATES:
            raise InvalidOption(f"candidates: n must be from 1 to {MAX_CANDIDATES}, not {self.n}")

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Refuse: there is no such row."""
        raise InvalidOption("rule 'candidates' has no next-token row in closed form: it can sample, but not score")

    @property
    def draws(self) -> int:
        """One uniform for each candidate, and one to choose among them."""
        return self.n + 1

    def sample(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, uniforms: Tensor) -> Tensor:
        """Propose n candidates, align their weights, reduce to one."""
        drawn = inverse_cdf(logp, uniforms[..., : self.n])
        if not logqs:
            return drawn[..., 0]
        at_drawn = weighted_sum(logqs, weights).gather(-1, drawn.clamp(min=0))
        choice = inverse_cdf(log_normalize(at_drawn), uniforms[..., self.n :])
        dead = (drawn == NO_TOKEN).any(-1) | (choice == NO_TOKEN).any(-1)
        return torch.where(dead, NO_TOKEN, drawn.gather(-1, choice.clamp(min=0)).squeeze(-1))


def weighted_sum(logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ log q_i^λ_i over whole rows `[..., V]` with weights `[..., n]`, see `log_power`."""
    terms = [log_power(logq, weight) for logq, weight in zip(logqs, torch.split(weights, 1, dim=-1), strict=True)]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def log_power(logq: Tensor, weight: Tensor) -> Tensor:
    """Log q^λ = λ log q of whole rows `[..., V]`, normalised or not, with weights `[..., 1]`; everyone takes it from here.

    Where q is 0: for λ > 0 the power is 0. For λ = 0 it is 1, like that of every token, whatever the row is. For λ < 0 it is
    that of the row's least likely possible token: an anti-expert holds an impossible token back no more than any other
    (docs/rules.md says why). A row that is no distribution becomes NaN throughout, unless λ is 0.
    """
    exponent = torch.where(weight == 0, 1.0, weight)  # 0 · −inf would be NaN, also in gradients
    power, masked = exponent * logq, impossible(logq)
    least = torch.where(masked, -math.inf, power).amax(-1, keepdim=True)
    power = torch.where(masked, torch.where(weight < 0, least, -math.inf), power)
    return torch.where(weight == 0, 0.0, torch.where(is_distribution(logq), power, math.nan))


def parse_rule(text: str | Rule) -> Rule:
    """Read a rule as `str` writes it: `product`, `candidates(n=8)`, `kl_gate(tau=0.2)`, `nucleus(force_eos=True)`.

    Raises:
        InvalidOption: no such rule, no such setting, or a value of the wrong kind.
    """
    if isinstance(text, Rule):
        return text
    if not isinstance(text, str):
        raise InvalidOption(f"rule must be the name of a rule, or a rule, not {text!r}")
    if len(text) > MAX_TEXT:
        raise InvalidOption(f"rule: no rule is longer than {MAX_TEXT} characters; choose one of {', '.join(sorted(RULES))}")
    name, bracket, rest = text.strip().partition("(")
    if name not in RULES:
        raise InvalidOption(f"rule: there is no rule '{name}'; choose one of {', '.join(sorted(RULES))}")
    if bracket and not rest.endswith(")"):
        raise InvalidOption(f"rule: '{text}' lacks its closing bracket")
    rule = RULES[name]
    options = {f.name: f for f in dataclasses.fields(rule) if f.metadata.get("option", True)}
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.removesuffix(")").split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in options:
            known = ", ".join(options) or "none"
            raise InvalidOption(f"rule: '{name}' has no setting '{key}'; it has: {known}")
        if key in settings:
            raise InvalidOption(f"rule: '{text}' gives {key} twice")
        settings[key] = _read_setting(name, options[key], value)
    try:
        return rule(**settings)
    except InvalidOption as error:
        raise InvalidOption(f"rule: {error}") from None


def _read_setting(rule: str, field: "dataclasses.Field[Any]", text: str) -> Any:
    kind = type(field.default)
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        value = float(value) if kind is float and type(value) is int else value
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
        value = None
    if type(value) is not kind:
        raise InvalidOption(f"rule: '{rule}' wants {field.name} as {kind.__name__}, not '{text}'")
    return value
