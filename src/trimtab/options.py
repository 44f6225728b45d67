"""Options as fields of dataclasses: a default, a help text, and what else there is to say of each.

Metadata of a field: `help`, `choices`, `required`, `metavar`, `verbatim` (the value may look like a flag), `kept` (a
configuration file may hold it for another run). A method `idle` says which options have no effect beside the others, and why; a
class says it of what it declares, or knows more of.
"""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from trimtab.errors import InvalidOption

__all__ = ["check_effects", "check_required", "make_options", "meant", "option"]

T = TypeVar("T")


def option(default: Any, text: str | Callable[[], str], **more: Any) -> Any:
    """A dataclass field with help, which may be made when it is asked for; further metadata may follow."""
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
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in settings:
        if name not in fields:
            raise InvalidOption(f"there is no option '{name}'{meant(name, fields)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if options is not None:
        made: T = dataclasses.replace(options, **given)  # type: ignore[type-var]
    else:
        check_required(kind, given)
        made = kind(**given)
    check_effects(made, given.keys())
    return made


def meant(word: str, known: Iterable[str]) -> str:
    """What a word that is not known was probably meant to be, as the end of a message; or nothing."""
    close = difflib.get_close_matches(word, known, 1)
    return f": did you mean {close[0]}?" if close else ""
