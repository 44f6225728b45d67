"""Decoding knobs, said once: what a request may ask for, with default, range and help, where it acts, and who may give it.

A field of one of the three groups is a knob. From the groups are made `trimtab.SamplingParams` and its checks, the settings of
`AlignedModel`, flags and keys of configuration files, the fields of HTTP bodies and of vLLM's `extra_args`, the arguments of
lm-evaluation-harness, what endpoints are sent, what a manifest's values may be, and which of all these counts. So a new knob is
a field here (a plain one of `ShapingKnobs` stands in `WarpSettings`, too), its line in the docstring of `SamplingParams`, and
the code that acts on it. All of `DrawingKnobs` and `ShapingKnobs` have flags, and of `EndingKnobs` those that
`trimtab.decode.options.SamplingOptions` names; a request to vLLM, which samples itself, may say those of `ShapingKnobs`.

Metadata of a knob, beside those of every option (`trimtab.options`):

    acts      on what: "length", "row" (the aligned one), "end", "draw", "report", "rule", "proposal" or "aligner" (their rows)
    neutral   of a setting that shapes rows: what counts where nobody says anything
    manifest  whether an aligner's manifest may say it: then `trimtab.models.aligner.Manifest` has it as a field
    openai    whether OpenAI's API has it: endpoints are then always sent it, and other knobs where they are not neutral
    http      whether a body has it under its own name: False where each route has its own way to say it
    harness   whether generation settings of lm-evaluation-harness may have it: False where the harness says it otherwise
"""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, TypedDict

from trimtab.errors import InvalidRequest
from trimtab.options import Range, option

__all__ = [
    "BLENDS",
    "KNOBS",
    "MAX_FACTOR",
    "SHAPING",
    "DrawingKnobs",
    "EndingKnobs",
    "Knob",
    "ShapingKnobs",
    "WarpSettings",
    "check_number",
    "shaping_of",
]

MAX_FACTOR = 1e6
"""The largest weight or bias: far beyond any use, and far from where float32 ends."""


def check_number(name: str, value: Any, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> None:
    """Refuse what is no finite number within these ends.

    Raises:
        InvalidRequest: names the field and the range.
    """
    number: Any = value
    fits = not isinstance(value, bool) and isinstance(value, Real) and abs(number) <= sys.float_info.max
    if not fits or number < low or number <= above or number > high:
        limits = [f"at least {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
        limits += [f"at most {high:g}"] * (high < math.inf)
        raise InvalidRequest(f"{name} must be a number {' and '.join(limits) or 'that is finite'}, not {value!r}")


def _check_integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        ends = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise InvalidRequest(f"{name} must be an integer{' of ' * bool(ends)}{' and '.join(ends)}, not {value!r}")


def _check_truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {value!r}")


def _check_numbers(name: str, value: Any, *, low: float, high: float) -> None:
    """One number, or a list of them."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    for i, number in enumerate(value if several else [value]):
        check_number(f"{name}[{i}]" if several else name, number, low=low, high=high)


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or not all(isinstance(text, str) and text for text in value):
        raise InvalidRequest(f"{name} must be a text or a list of texts, none of them empty, not {value!r}")


def _check_choice(name: str, value: Any, *, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InvalidRequest(f"{name} must be {' or '.join(choices)}, not {value!r}")


def _check_ids(name: str, value: Any) -> None:
    if not isinstance(value, Sequence):
        raise InvalidRequest(f"{name} must be a list of token ids, not {value!r}")
    for token in value:
        _check_integer(name, token, low=0)


def _check_biases(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must map token ids to numbers, not {value!r}")
    for token, bias in value.items():
        _check_integer(f"{name}: a token id", token, low=0)
        check_number(f"{name}[{token}]", bias, low=-MAX_FACTOR, high=MAX_FACTOR)


def _knob(default: Any, acts: str, text: str, check: Callable[..., None] | None = None, **more: Any) -> Any:
    """A field with `check(name, value)`, which is also told the ends of the range that `more` names."""
    ends = {end: more[end] for end in Range._fields if end in more}
    return option(default, text, acts=acts, check=check and partial(check, **ends), **more)


BLENDS = ("logits", "weights")
"""What the weights of several aligners mix."""

_number, _integer = partial(_knob, check=check_number), partial(_knob, check=_check_integer)


@dataclass(frozen=True)
class DrawingKnobs:
    """How long a completion may be, how many there are, and how tokens are drawn; every one has a flag."""

    max_tokens: int = _integer(128, "length", "most tokens of a completion", low=1, openai=True, http=False, harness=False)
    n: int = _integer(1, "length", "completions of each prompt", low=1, openai=True, harness=False)
    temperature: float = _number(1.0, "row", "0 is greedy", low=0, openai=True)
    top_p: float = _number(1.0, "row", "keep the most probable tokens up to this mass", above=0, high=1, openai=True)
    top_k: int = _integer(0, "row", "keep the k most probable tokens; 0 or -1 keeps all", low=-1)
    min_p: float = _number(0.0, "row", "keep tokens at least this fraction as probable as the best", low=0, high=1)
    repetition_penalty: float = _number(
        1.0, "row", "above 1 makes tokens of the prompt and the text so far rarer", low=1e-3, high=1e3
    )


@dataclass(frozen=True)
class EndingKnobs:
    """Which tokens are likelier, where a completion ends, its random numbers, and what is told of it; few have a flag."""

    logit_bias: Mapping[int, float] = dataclasses.field(
        default_factory=dict,
        metadata={
            "help": "added to the log-probability of token ids", "acts": "row", "check": _check_biases, "harness": False
        },
    )  # fmt: skip
    stop: str | Sequence[str] = _knob((), "end", "texts that end a completion", _check_texts, openai=True, harness=False)
    stop_token_ids: Sequence[int] = _knob((), "end", "further token ids that end a completion", _check_ids)
    ignore_eos: bool = _knob(False, "end", "go on after an end of sequence", _check_truth)
    seed: int | None = _integer(
        None, "draw", "the same seed gives the same text, in float32 [default: a fresh one]", openai=True
    )
    logprobs: bool = _knob(
        False, "row", "also return the log-probability of each token", _check_truth, http=False, harness=False
    )
    top_logprobs: int = _integer(
        0, "report", "with them, the so many best tokens at each position", low=0, http=False, harness=False
    )


@dataclass(frozen=True)
class ShapingKnobs:
    """How the aligned row comes about; None leaves it to the model's own settings, and those to the aligners' manifests."""

    rule: Any = _knob(  # noqa: RUF009 - a field, whose type is a rule, which this module does not know
        None,
        "rule",
        "decoding rule, such as product or 'candidates(n=8)' [default: the manifest's, or product]",
        manifest=True,
    )
    handover: Any = _knob(  # noqa: RUF009 - as rule
        None,
        "rule",
        "one rule until the proposal finds what is written likely, then another: 'confidence(window=6, threshold=0.8)'",
    )
    weight: float | Sequence[float] | None = _knob(
        None, "rule", "the aligner's strength, or one for each aligner", _check_numbers, low=-MAX_FACTOR, high=MAX_FACTOR,
        manifest=True,
    )  # fmt: skip
    blend: str | None = _knob(
        None,
        "rule",
        "what the aligners' weights mix: their rows (logits), by the rule, or, of LoRA aligners of one base, the adapters"
        " themselves (weights), which then are one aligner [default: logits]",
        partial(_check_choice, choices=BLENDS),
        choices=BLENDS,
    )
    rule_weight: float | None = _number(
        None,
        "rule",
        "with blend weights, the strength of the blended aligner [default: the manifests', or the rule's]",
        low=-MAX_FACTOR,
        high=MAX_FACTOR,
    )
    proposal_temperature: float | None = _number(
        None, "proposal", "temperature of the proposal's row, before the rule", above=0, neutral=1.0, manifest=True
    )
    proposal_top_k: int | None = _integer(None, "proposal", "top-k of the proposal's row, before the rule", low=-1, neutral=0)
    proposal_top_p: float | None = _number(
        None, "proposal", "top-p of the proposal's row, before the rule", above=0, high=1, neutral=1.0, manifest=True
    )
    aligner_temperature: float | None = _number(
        None, "aligner", "temperature of the aligners' rows, before the rule", above=0, neutral=1.0, manifest=True
    )


class WarpSettings(TypedDict, total=False):
    """The plain knobs of `ShapingKnobs`, as keyword arguments: `rule` and `weight` apart, which signatures spell out."""

    blend: str | None
    rule_weight: float | None
    proposal_temperature: float | None
    proposal_top_k: int | None
    proposal_top_p: float | None
    aligner_temperature: float | None


class Knob(NamedTuple):
    """What the schema says of one knob."""

    name: str
    kind: type | None
    """`int`, `float` or `bool`; None where values have a shape of their own."""
    nullable: bool
    """Whether None is a value: then it means that nothing is said."""
    default: Any
    said: Mapping[str, Any]
    """Its metadata."""

    @property
    def range(self) -> Range:
        """Which numbers it may be."""
        return Range.of(self.said)

    def check(self, value: Any) -> None:
        """Refuse a value that cannot be.

        Raises:
            InvalidRequest: names the knob and what it must be.
        """
        if self.said["check"] is not None and not (value is None and self.nullable):
            self.said["check"](self.name, value)


def _read(group: type) -> dict[str, Knob]:
    """The knobs of a group, by name."""
    hints, knobs = typing.get_type_hints(group), {}
    for field in dataclasses.fields(group):
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = [kind for kind in kinds if kind is not type(None)]
        kind = plain[0] if len(plain) == 1 and plain[0] in (int, float, bool) else None
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        knobs[field.name] = Knob(field.name, kind, field.default is None, default, field.metadata)
    return knobs


KNOBS: dict[str, Knob] = _read(DrawingKnobs) | _read(EndingKnobs) | _read(ShapingKnobs)
"""Every knob, by name."""

SHAPING: tuple[str, ...] = tuple(_read(ShapingKnobs))
"""Those of how the row comes about: all that a request to vLLM may say, which samples itself."""


def shaping_of(options: Any) -> dict[str, Any]:
    """What options say of how the row comes about, as keyword arguments; no weights stand for None."""
    found = {name: getattr(options, name) for name in SHAPING}
    return {name: None if value == () else value for name, value in found.items()}
