"""Options as fields of dataclasses: a default, a help text, and what else there is to say of each.

Metadata of a field: `help`, `choices`, `required`, `metavar`, `verbatim` (the value may look like a flag), `kept` (a
configuration file may hold it for another run). A method `idle` says which options have no effect beside the others, and why; a
class says it of what it declares, or knows more of.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from trimtab.errors import InvalidOption

__all__ = ["Flag", "check_effects", "check_ranges", "check_required", "make_options", "meant", "nest", "option"]

T = TypeVar("T")


class Flag(NamedTuple):
    """An option that is no field of its own, but a key of a mapping that is one; the field's metadata has `nested`.

    `nested` gives these by name: it is a function without arguments, for what they are may be a matter of what is installed.
    """

    kind: type
    """Of its value."""
    text: str
    """Its help."""


def option(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field with help; further metadata may follow."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


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


def check_ranges(options: Any) -> None:
    """Refuse numbers below `low` or above `high`, of fields that have such bounds; None is always right."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        low, high = (field.metadata.get(name, bound) for name, bound in (("low", -math.inf), ("high", math.inf)))
        if value is not None and ("low" in field.metadata or "high" in field.metadata) and not low <= value <= high:
            raise InvalidOption(f"{field.name} must be from {low:g} to {high:g}, not {value}")


def check_required(kind: type, values: Mapping[str, Any]) -> None:
    """Refuse to go on without what is required."""
    for field in dataclasses.fields(kind):
        if field.metadata.get("required") and values.get(field.name) in (None, [], (), ""):
            raise InvalidOption(f"--{field.name} is required")


def make_options(kind: type[T], options: T | None, settings: Mapping[str, Any]) -> T:
    """The options of a call from Python: as they are, or from settings by name, with the checks that flags get.

    Args:
        kind: the dataclass.
        options: an instance of it.
        settings: in its place, or over its fields; a list counts as a tuple.

    Raises:
        InvalidOption: an option is not known, is missing, cannot have its value, or has no effect beside the others.
    """
    given = nest(kind, {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise InvalidOption(f"there is no option '{name}'{meant(name, known)}")
    if options is not None:
        made: T = dataclasses.replace(options, **given)  # type: ignore[type-var]
    else:
        check_required(kind, given)
        made = kind(**given)
    check_effects(made, given.keys())
    return made


def nest(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, with those of nested options in the mappings that they belong to; unknown ones stay where they are."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    nested = {name: field.metadata["nested"]() for name, field in fields.items() if "nested" in field.metadata}
    given: dict[str, Any] = {}
    for name, value in values.items():
        home = None if name in fields else next((home for home, flags in nested.items() if name in flags), None)
        if home is None:
            given[name] = value
        else:
            given[home] = {**given.get(home, values.get(home, {})), name: value}
    return given


def meant(word: str, known: Iterable[str]) -> str:
    """What a word that is not known was probably meant to be, as the end of a message; or nothing."""
    close = difflib.get_close_matches(word, known, 1)
    return f": did you mean {close[0]}?" if close else ""
