"""Flags and configuration files from dataclasses: a field is a flag, its metadata its help.

Field types are `str`, `int`, `float`, `bool`, one of these or None, or a tuple of one of them (the flag repeats); what their
metadata mean, `trimtab.options` says. A field named `training` stands for the fields of `transformers.TrainingArguments`, and
its `defaults` are some of theirs.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trimtab.cli.parser import Parser, choice, underscored
from trimtab.errors import InvalidOption
from trimtab.options import check_effects, check_ranges, check_required, help_of, meant, nest

__all__ = ["add_options", "read_options"]

T = TypeVar("T")


def add_options(parser: Parser, options: type) -> None:
    """Add a flag for each field; nothing is set for flags that are not given."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        said = field.metadata
        if "nested" in said:
            _add_nested(parser, field)
            continue
        kind, repeats = _kind(hints[field.name])
        choices, metavar = said.get("choices", ()), said.get("metavar", "")
        _add(parser, field.name, kind, help_of(field), repeats=repeats, choices=choices, metavar=metavar)
        if said.get("verbatim"):
            parser.verbatim.add(f"--{field.name}")


def read_options(options: type[T], given: dict[str, Any]) -> T:
    """Options from flags, over the configuration file's, over the defaults.

    Args:
        options: the dataclass.
        given: the flags that were given, and maybe `config`.

    Raises:
        InvalidOption: the configuration file cannot be read or has an unknown key, something required is missing, a number is
            out of its range, or an option has no effect beside the others.
    """
    given = dict(given)
    values = _read_config(options, given.pop("config")) if "config" in given else {}
    values |= given
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    check_required(options, values)
    values = nest(options, {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    made = options(**values)
    check_ranges(made)
    kept = {name for name, field in fields.items() if field.metadata.get("kept")}
    check_effects(made, values.keys() - (kept - given.keys()))
    return made


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands there twice, in whatever spelling, is an error: otherwise the last one would count."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[str, str] = {}
    for key, _ in node.value:
        name = underscored(str(key.value))
        if name in seen:
            raise InvalidOption(
                f"line {key.start_mark.line + 1}: '{seen[name]}' and '{key.value}' are one option: give it once"
            )
        seen[name] = key.value
    return loader.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _read_config(options: type, path: str) -> dict[str, Any]:
    """The file's values, converted by the same parser as flags."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"--config: {error}") from None
    except yaml.YAMLError as error:
        raise InvalidOption(f"--config {path}: not YAML: {error}") from None
    except InvalidOption as error:
        raise InvalidOption(f"--config {path}: {error}") from None
    if not isinstance(content, dict):
        raise InvalidOption(f"--config {path}: must hold a mapping of options")
    parser = Parser(path, add_help=False)
    add_options(parser, options)
    known = {action.dest: action for action in parser.flags.values()}
    words = []
    for key, value in content.items():
        name = underscored(str(key))
        if name not in known:
            raise InvalidOption(f"--config {path}: there is no option '{key}'{meant(name, known)}")
        if isinstance(value, list) and not isinstance(known[name], argparse._AppendAction):
            raise InvalidOption(f"--config {path}: {name} takes one value, not a list")
        if any(isinstance(item, (dict, list)) for item in (value if isinstance(value, list) else [value])):
            raise InvalidOption(f"--config {path}: {name} takes plain values, not {value!r}")
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                words += [f"--{name}={item}"]
    try:
        return parser.read(words)
    except InvalidOption as error:
        raise InvalidOption(f"--config {path}: {error}") from None


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether the flag repeats. Of several types a flag has the first; others come from Python."""
    if typing.get_origin(hint) is tuple:
        return _kind(typing.get_args(hint)[0])[0], True
    if isinstance(hint, types.UnionType):
        return _kind(next(part for part in typing.get_args(hint) if part is not type(None)))
    return hint, False


def _add(
    parser: argparse._ActionsContainer,
    name: str,
    kind: type,
    text: str,
    *,
    repeats: bool = False,
    choices: Sequence[str] = (),
    metavar: str = "",
) -> None:
    """Add one flag; a truth value may go without its value."""
    how: dict[str, Any] = {"action": "append" if repeats else "store", "type": kind}
    how["metavar"] = metavar or {int: "N", float: "X"}.get(kind, "TEXT")
    if choices:
        how |= {"type": choice(choices), "metavar": "{" + ",".join(choices) + "}"}
    if kind is bool:
        how = {"nargs": "?", "const": True, "type": _boolean, "metavar": "BOOL"}
    parser.add_argument(f"--{name}", help=text.replace("%", "%%"), **how)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def _add_nested(parser: Parser, field: "dataclasses.Field[Any]") -> None:
    group = parser.add_argument_group(field.metadata["title"], field.metadata.get("text"))
    taken = {action.dest for action in parser._actions}
    for name, (kind, text, choices) in field.metadata["nested"]().items():
        if name in taken:
            continue
        _add(group, name, kind, text, choices=choices, metavar=kind.__name__.upper())
