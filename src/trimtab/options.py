"""Options as fields of dataclasses: a default, a help text, and what else there is to say of each.

Metadata of a field: `help`, `choices`, `required`, `metavar`, `verbatim` (the value may look like a flag), `kept` (a
configuration file may hold it for another run), `later` (there are runs from before it, which had its default), and the range
of a number, or of each one of several: `low` and `high` are in it, `above` and `below` are not; `below=math.inf` asks for a
finite one. `check(name, value)` takes the place of the range where it stands, and raises. A method `idle` says which options
have no effect beside the others, and why; a class says it of what it declares, or knows more of.
"""

import contextlib
import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar

from trimtab.errors import InvalidOption, InvalidRequest, TrimtabError

__all__ = [
    "Flag",
    "Range",
    "check_effects",
    "check_ranges",
    "check_required",
    "help_of",
    "make_options",
    "meant",
    "named_for_python",
    "nest",
    "option",
    "same",
]

T = TypeVar("T")

FAR = 1e6
"""Ends as far away as this keep numbers from overflowing, and are nothing that a reader need know."""


class Flag(NamedTuple):
    """An option that is no field of its own, but a key of a mapping that is one; the field's metadata has `nested`.

    `nested` gives these by name: it is a function without arguments, for what they are may be a matter of what is installed.
    """

    kind: type
    """Of its value."""
    text: str
    """Its help."""
    choices: tuple[str, ...] = ()
    """What it may be; empty for anything."""


def option(default: Any, text: str | Callable[[], str], **more: Any) -> Any:
    """A dataclass field with help, or with what gives it when it is shown; further metadata may follow."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


def same(kind: type, name: str, **changes: Any) -> Any:
    """A field as another dataclass has it, but for a `default` or metadata that are given."""
    (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
    return dataclasses.field(default=changes.pop("default", field.default), metadata={**field.metadata, **changes})


class Range(NamedTuple):
    """Which numbers an option takes: from `low` to `high`, both in it, or between `above` and `below`, which are not."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Self:
        """What the metadata of a field say of it."""
        return cls(**{end: metadata[end] for end in cls._fields if end in metadata})

    def holds(self, value: Any) -> bool:
        """Whether a value is a number that is in it; NaN is in none that has an end."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        number: Any = value
        return bool(
            (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )

    @property
    def is_telling(self) -> bool:
        """Whether a reader learns more than that counts are none or some, and sizes above 0."""
        near_end = any(end is not None and end < FAR for end in (self.high, self.below))
        return near_end or self.low not in (None, -1, 0, 1, -FAR) or self.above not in (None, 0)

    def __str__(self) -> str:
        """In words that follow "must be"."""
        low, above, high, below = (None if end is None else f"{end:g}" if isinstance(end, float) else str(end) for end in self)
        if low is not None and high is not None:
            return f"from {low} to {high}"
        if above is not None and below not in (None, "inf"):
            return f"between {above} and {below}"
        ends = (("at least ", low), ("above ", above), ("at most ", high), ("below ", below))
        return " and ".join("finite" if end == "inf" else word + end for word, end in ends if end is not None)


def help_of(field: "dataclasses.Field[Any]") -> str:
    """An option's help: what it is, its range where that says something, and its default."""
    said = field.metadata["help"]
    text, bracket, default = str(said() if callable(said) else said).partition(" [default")
    if (allowed := Range.of(field.metadata)).is_telling:
        text += f" ({allowed})"
    text += bracket + default
    if field.metadata.get("required"):
        text += " (required)"
    elif field.default not in (None, (), False, "") and not bracket:
        text += f" [default: {field.default}]"
    return text


def check_ranges(options: Any) -> None:
    """Refuse numbers outside the ranges of their fields; None is in every range.

    Raises:
        InvalidOption: names the option, its range and the value.
    """
    for field in dataclasses.fields(options):
        given, allowed = getattr(options, field.name), Range.of(field.metadata)
        if (check := field.metadata.get("check")) is not None and given is not None:
            try:
                check(field.name, given)
            except InvalidRequest as error:
                raise InvalidOption(str(error)) from error
            continue
        for value in given if isinstance(given, tuple | list) else (given,):
            if value is not None and allowed != Range() and not allowed.holds(value):
                raise InvalidOption(f"--{field.name} must be {allowed}, not {value!r}")


def check_effects(options: Any, given: Collection[str]) -> None:
    """Refuse what is asked for and would not be done. An option that is off (false, "none", empty) asks for nothing."""
    idle: dict[str, str] = {}
    for kind in reversed(type(options).__mro__):
        if "idle" in vars(kind):
            idle |= kind.idle(options)  # type: ignore[attr-defined]
    for field in dataclasses.fields(options):
        name, value = field.name, getattr(options, field.name)
        off = value is None or value is False or value in ("", "none", ())
        if name in idle and name in given and not off:
            raise InvalidOption(f"--{name} {idle[name]}")


def check_required(kind: type, values: Mapping[str, Any]) -> None:
    """Refuse to go on without what is required."""
    for field in dataclasses.fields(kind):
        if field.metadata.get("required") and values.get(field.name) in (None, [], (), ""):
            raise InvalidOption(f"--{field.name} is required")


def make_options(kind: type[T], options: T | None, settings: Mapping[str, Any]) -> T:
    """The options of a call from Python: as they are, or from settings by name, with the checks that flags get.

    Args:
        kind: the dataclass.
        options: an instance of it; what differs from the defaults counts as asked for.
        settings: in its place, or over its fields. None is the default. Where an option repeats, a list counts as a tuple, and
            one value as one of it alone.

    Raises:
        InvalidOption: an option is not known, is missing, cannot have its value, or has no effect beside the others.
    """
    if options is not None and not isinstance(options, kind):
        raise InvalidOption(f"options must be {kind.__name__}, not {options!r}: give options by name otherwise")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    asked = {} if options is None else {name: getattr(options, name) for name in fields}
    nested = {name: field.metadata["nested"]() for name, field in fields.items() if "nested" in field.metadata}
    settings = {name: value for name, value in settings.items() if name not in nested or value is not None}
    for name in nested.keys() & settings.keys():
        if not isinstance(settings[name], Mapping):
            raise InvalidOption(f"--{name} must be a mapping of options, not {settings[name]!r}")
    given = nest(kind, settings, asked)
    for name in given:
        if name not in fields:
            raise InvalidOption(f"there is no option '{name}'{meant(name, _names(kind))}")
    for home in nested.keys() & given.keys():
        given[home] = {name: value for name, value in given[home].items() if value is not None}
        for name in nested[home].keys() & given[home].keys():
            _check_type(name, nested[home][name].kind, given[home][name])
    given = {name: _repeated(fields[name], value) for name, value in given.items()}
    hints = typing.get_type_hints(kind)
    for name, value in given.items():
        if isinstance(value, Real) or Range.of(fields[name].metadata) == Range():  # a range refuses what is no number
            _check_type(name, hints[name], value)
        choices = fields[name].metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise InvalidOption(f"--{name} must be one of {', '.join(choices)}, not {value!r}")
    check_required(kind, asked | given)
    made = kind(**given) if options is None else dataclasses.replace(options, **given)  # type: ignore[type-var]
    check_ranges(made)
    check_effects(made, given.keys() | {name for name, value in asked.items() if value != fields[name].default})
    return made


def nest(kind: type, values: Mapping[str, Any], known: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Values by name, with those of nested options in the mappings that they belong to; unknown ones stay where they are.

    Args:
        kind: the dataclass.
        values: by name; a mapping that is given whole is added to.
        known: what the mappings hold already, where `values` has none.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    nested = {name: field.metadata["nested"]() for name, field in fields.items() if "nested" in field.metadata}
    given = {name: value for name, value in values.items() if name in fields}
    for name, value in values.items():
        if name in fields:
            continue
        home = next((home for home, flags in nested.items() if name in flags), None)
        if home is None:
            given[name] = value
        else:
            given[home] = {**given.get(home, known.get(home, {})), name: value}
    return given


PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
"""Types whose values are checked, in words."""


def _check_type(name: str, hint: Any, value: Any) -> None:
    """Refuse a value of another type, of options that have a plain one or several of it; an integer is a number, too."""
    kinds = [part for part in typing.get_args(hint) or (hint,) if part not in (type(None), Ellipsis)]
    if value is None or not kinds or any(part not in PLAIN for part in kinds):
        return
    several = typing.get_origin(hint) is tuple
    for one in value if several and isinstance(value, tuple) else (value,):
        if type(one) not in kinds and not (float in kinds and type(one) is int):
            raise InvalidOption(f"--{name} must be {PLAIN[kinds[0]]}, not {one!r}")


def _names(kind: type) -> set[str]:
    """Every option of a dataclass, nested ones too."""
    fields = dataclasses.fields(kind)
    return {name for field in fields for name in (field.name, *field.metadata.get("nested", dict)())}


def _repeated(field: "dataclasses.Field[Any]", value: Any) -> Any:
    if value is None and field.default is not dataclasses.MISSING:
        return field.default
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(field.default, tuple) and not isinstance(value, tuple) else value


@contextlib.contextmanager
def named_for_python(kind: type) -> Iterator[None]:
    """Messages name options as flags; of those that leave a call from Python the dashes are taken."""
    try:
        yield
    except TrimtabError as error:
        names = _names(kind)

        def bare(flag: "re.Match[str]") -> str:
            return flag[1] if flag[1] in names else flag[0]

        error.args = tuple(re.sub(r"--(\w+)", bare, part) if isinstance(part, str) else part for part in error.args)
        raise


def meant(word: str, known: Iterable[str]) -> str:
    """What a word that is not known was probably meant to be, as the end of a message; or nothing."""
    close = difflib.get_close_matches(word, known, 1)
    return f": did you mean {close[0]}?" if close else ""
