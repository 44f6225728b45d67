"""What every decoding rule has in common, and the registry of all of them.

A rule is a frozen value. `rule(logp, logqs, weights)` maps the proposal's row log p̃ and the rows log q_1 … log q_n, each
`[..., V]`, to the normalised target row `[..., V]`. It is pure, works on any number of leading dimensions row by row, never
writes to its arguments, and never gives mass to a token outside the proposal's support. Weights are λ_1 … λ_n; a negative
one makes its aligner an anti-expert, and 0 removes it, whatever that aligner says. What q^λ is where q is 0, `log_power` says.

A rule may look beyond its rows, at the text before them: it says at what, and is given a `Context`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from trimtab.core.draw import inverse_cdf
from trimtab.core.logprobs import impossible, is_distribution, log_normalize
from trimtab.core.rules.context import Context
from trimtab.errors import DeadRow, InvalidOption
from trimtab.registry import Registry

__all__ = ["PLAIN", "RULES", "Rule", "check_rule", "log_power", "register", "unless_broken", "weighted_sum"]


@dataclass(frozen=True)
class Rule:
    """What every rule has in common. Instances are values: equal settings are equal rules."""

    name: ClassVar[str]
    has_row: ClassVar[bool] = True
    """Whether the next-token distribution has a closed form, so that it can be scored, enumerated and verified."""
    draft_temperature: ClassVar[float] = 1.0
    """The temperature at which an aligner drafts best for this rule, as a rule of thumb."""
    marks: ClassVar[str | None] = None
    """What `marked` says of a row, in a word or two, if anything: `Completion.fallbacks` counts those rows."""

    hands_over: ClassVar[bool] = False
    """Whether one rule begins an answer and another goes on, whose rows it marks: `Completion.handover_at` is the first."""

    def __post_init__(self, *_: Any) -> None:
        """Refuse a setting of another kind than its default; a rule that checks values calls this first.

        Numbers and texts of other types that are such (NumPy's, enumerations of texts) become plain ones.

        Raises:
            InvalidOption: names the setting and the kind.
        """
        for field in dataclasses.fields(self):
            if field.metadata.get("option", True):
                value = getattr(self, field.name)
                try:
                    plain = _plain(value, field)
                except TypeError as error:
                    raise InvalidOption(f"{self.name}: {field.name} must be {error}, not {value!r}") from None
                object.__setattr__(self, field.name, plain)

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """The target up to a factor, `[..., V]`, from rows `[..., V]` and weights `[..., n]`; the support is cut for you.

        The context is of the same rows, and there only if the rule `looks_back`; any other rule may leave it out of its own.
        """
        raise NotImplementedError

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """The normalised target row `[..., V]`, never waiting for the device: a row without mass comes out as NaN.

        Args:
            logp: the proposal's rows log p̃.
            logqs: one tensor of rows for each aligner.
            weights: `[..., n]`, one weight for each aligner; the leading dimensions broadcast with those of the rows.
            context: of the rows, for a rule that `looks_back`.

        Raises:
            InvalidOption: the rule looks back, and there is no context.
        """
        if not logqs:
            return logp
        return log_normalize(self._cut(logp, logqs, weights, context))

    def log_z(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Log of the mass `[...]` by which `target` divides, in nats; −inf for a row without mass. Arguments as for `target`.

        For `product` log Σ_v p̃(v) Π q_i(v)^λ_i, for `nucleus` at λ = 1 the log of the aligner's mass on the support of p̃. It
        means something only where the rule `weighs_tokens`: a gate, or a row that may be replaced, mixes two normalisers.
        """
        return self._cut(logp, logqs, weights, context).logsumexp(-1)

    def weigh(
        self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """`target` `[..., V]` and `log_z` `[...]`, with the work of one; the arguments are `target`'s, aligners among them."""
        logw = self._cut(logp, logqs, weights, context)
        log_z = logw.logsumexp(-1)
        return logw - log_z.unsqueeze(-1), log_z

    def _cut(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, context: Context | None) -> Tensor:
        """`log_weights` on the support of p̃; NaN where p̃ is no distribution, which must not pass unnoticed."""
        logw = self.log_weights(logp, logqs, weights, **self.seen(context))
        if logw.shape[-1] != logp.shape[-1]:
            raise InvalidOption(f"rule '{self}': log_weights gives {logw.shape[-1]} numbers a row, and not {logp.shape[-1]}")
        logw = torch.where(impossible(logp), -math.inf, logw)
        return torch.where(is_distribution(logp), logw, math.nan)

    def __call__(
        self,
        logp: Tensor,
        logqs: Sequence[Tensor],
        weights: Tensor | Sequence[float],
        *,
        context: Context | None = None,
    ) -> Tensor:
        """`target`, with weights as numbers if you like, and with an error for a row that has no mass.

        Raises:
            DeadRow: some row is −inf throughout, or has NaN or +inf, or the rows of a place share no support.
            InvalidOption: the rule has no law for some of the weights.
        """
        weights = torch.as_tensor(weights, dtype=logp.dtype, device=logp.device)
        for one in weights.flatten(0, -2).tolist() if weights.ndim > 1 else [weights.tolist()]:
            self.check_weights(one)
        row = self.target(logp, logqs, weights, **self.seen(context, needed=bool(logqs)))
        if not bool(is_distribution(row).all()):
            raise DeadRow(f"rule '{self}' leaves no token with any probability: the rows share no support, or are NaN")
        return row

    def sample(
        self,
        logp: Tensor,
        logqs: Sequence[Tensor],
        weights: Tensor,
        uniforms: Tensor,
        *,
        context: Context | None = None,
    ) -> Tensor:
        """Draw tokens `[...]` from rows `[..., V]` with `uniforms` `[..., draws]`; `NO_TOKEN` where none is possible."""
        row = self.target(logp, logqs, weights, **self.seen(context, needed=bool(logqs)))
        return inverse_cdf(row, uniforms[..., :1]).squeeze(-1)

    def marked(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Which rows `[...]` the rule marks, if it has `marks`."""
        raise NotImplementedError

    @property
    def lets_go(self) -> bool:
        """Whether no aligner plays a part any more once it has handed over.

        There a token is drawn as where nobody drafts, so that the aligners may be let go without changing it.
        """
        return False

    # ---- what it looks at beyond its rows

    @property
    def window(self) -> int:
        """How many tokens before a row it wants to see."""
        return 0

    @property
    def reads_logp(self) -> bool:
        """Whether it wants log p̃ of the tokens that it sees and of those that its state advances by."""
        return False

    @property
    def state_size(self) -> int:
        """How many numbers it keeps of a text."""
        return 0

    @property
    def looks_back(self) -> bool:
        """Whether it wants a `Context`; a rule that looks at positions alone says so here."""
        return self.window > 0 or self.state_size > 0

    def initial_state(self) -> Sequence[float]:
        """The numbers at the first token of an answer, `state_size` of them."""
        return (0.0,) * self.state_size

    def advance(self, context: Context, tokens: Tensor, logp: Tensor) -> Tensor:
        """The state `[..., s]` behind rows `[...]` where these `tokens` `[...]` were decided, with log p̃ `[...]` of each.

        It must be pure, and go row by row: drafts are advanced by, and what they made is dropped when they are rejected.
        """
        raise NotImplementedError

    def seen(self, context: Context | None, *, needed: bool = True) -> dict[str, Any]:
        """The context as keywords for the rule's own methods: none for a rule that does not look back.

        Args:
            context: of the rows.
            needed: whether the rule cannot do without.

        Raises:
            InvalidOption: the rule looks back and needs it, and there is none.
        """
        if not self.looks_back or not needed:
            return {}
        if context is None:
            raise InvalidOption(f"rule '{self}' looks at the text before a row, which is not to be had here: use another rule")
        return {"context": context}

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

    def check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights that the rule has no law for. Whoever settles weights asks, before any work is done.

        Raises:
            InvalidOption: begins with `weight`, and says what to do.
        """

    def together(self, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
        """What the aligners say together, `[..., V]` log weights: Π q_i^λ_i, or what the rule has in its place."""
        return weighted_sum(logqs, weights)

    def bind(self, eos_token_ids: Sequence[int]) -> Self:
        """This rule for a model with these end-of-sequence ids; only rules that treat them specially change."""
        return self

    def __str__(self) -> str:
        """The rule as `parse_rule` reads it: its name, and those of its settings that are not the defaults."""
        shown = [f for f in dataclasses.fields(self) if f.metadata.get("option", True)]
        given = [f"{f.name}={_write_setting(getattr(self, f.name))}" for f in shown if not self._has_default(f)]
        return f"{self.name}({', '.join(given)})" if given else self.name

    def _has_default(self, field: "dataclasses.Field[Any]") -> bool:
        """Whether a setting is what it is where nobody says it."""
        return bool(getattr(self, field.name) == field.default)


KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
"""What a setting may be, as far as text can say it, and what errors call it; or another rule."""

NAME = re.compile(r"[a-z][a-z0-9_-]*")
PLAIN = re.compile(r"[\w.:/+-]+")
"""Texts that need no quotes."""


def _plain(value: Any, field: "dataclasses.Field[Any]") -> Any:
    """A setting's value in the type of its default, or the value itself where that is neither of `KINDS` nor a rule.

    Raises:
        TypeError: it is of another kind; the message says what it must be.
    """
    default = field.default
    if isinstance(default, Rule) and not isinstance(value, Rule):
        raise TypeError("a rule, such as Product()")
    kind: Any = float if field.type in (float, "float") else type(default)  # of which a whole number is a default, too
    if kind not in KINDS:
        return value
    accepted = {bool: bool, int: Integral, float: Real, str: str}[kind]
    if not isinstance(value, accepted) or (kind in (int, float) and isinstance(value, bool)):
        raise TypeError(KINDS[kind])
    return str.__str__(value) if kind is str else kind(value)


def check_rule(rule: Any) -> None:
    """Refuse what cannot be a rule.

    Raises:
        InvalidOption: it is no frozen dataclass that is a `Rule`, has no name that text can say, or a setting without a default
            that text can say.
    """
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise InvalidOption(f"a rule is a class that inherits from trimtab.core.rules.Rule, and this is {rule!r}")
    settings = vars(rule).get("__dataclass_params__")
    if settings is None or not settings.frozen:
        raise InvalidOption(f"{rule.__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it")
    name = getattr(rule, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidOption(f"{rule.__name__} needs a name of small letters, digits, '_' and '-', such as 'my_rule'")
    for field in dataclasses.fields(rule):
        is_setting = field.metadata.get("option", True)
        if field.default is dataclasses.MISSING if is_setting else _has_no_default(field):
            raise InvalidOption(f"{rule.__name__}.{field.name} needs a default, so that the name alone is a rule")
        if is_setting and type(field.default) not in KINDS and not isinstance(field.default, Rule):
            kinds = ", ".join(kind.__name__ for kind in KINDS)
            must = f"must have one of {kinds}, or a rule, for a default"
            raise InvalidOption(f"{rule.__name__}.{field.name} {must}, not {field.default!r}")
    if rule.has_row and rule.log_weights is Rule.log_weights and rule.target is Rule.target:
        raise InvalidOption(f"{rule.__name__} lacks log_weights")
    if rule.marks is not None and rule.marked is Rule.marked:
        raise InvalidOption(f"{rule.__name__} says what it marks, and lacks marked")
    if rule.hands_over and rule.marks is None:
        raise InvalidOption(
            f"{rule.__name__} hands over, and lacks marks: the rows that it marks are those after the hand-over"
        )
    if rule().lets_go and not rule.hands_over:
        raise InvalidOption(f"{rule.__name__} lets aligners go, and does not say that it hands over: set hands_over")
    if rule().state_size and rule.advance is Rule.advance:
        raise InvalidOption(f"{rule.__name__} keeps a state, and lacks advance")


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


RULES: Registry[type[Rule]] = Registry("rule", "trimtab.rules", check_rule)
"""Every rule by its name: ours, and those of other packages' entry points."""

_R = TypeVar("_R", bound=type[Rule])


def register(rule: _R) -> _R:
    """Class decorator that puts a rule into `RULES`.

    Raises:
        InvalidOption: it cannot be a rule, or its name is taken.
    """
    check_rule(rule)
    RULES.register(rule)
    return rule


def weighted_sum(logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ log q_i^λ_i over whole rows `[..., V]` with weights `[..., n]`, see `log_power`."""
    terms = [log_power(logq, weight) for logq, weight in zip(logqs, torch.split(weights, 1, dim=-1), strict=True)]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def unless_broken(row: Tensor, logqs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """A row `[..., V]` that some aligners play no part in: NaN all the same where one that has a weight is no distribution."""
    for logq, weight in zip(logqs, torch.split(weights, 1, dim=-1), strict=True):
        row = torch.where((weight == 0) | is_distribution(logq), row, math.nan)
    return row


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


def _write_setting(value: Any) -> str:
    return repr(value) if isinstance(value, str) and not PLAIN.fullmatch(value) else str(value)
