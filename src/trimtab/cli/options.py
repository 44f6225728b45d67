"""Flags and configuration files from dataclasses: a field is a flag, its metadata its help.

Field types are `str`, `int`, `float`, `bool`, one of these or None, or a tuple of one of them (the flag repeats). Metadata:
`help`, `choices`, `required`, `metavar`, `verbatim` (the value may look like a flag), `kept` (a configuration file may hold it
for another run). A field named `training` stands for the fields of `transformers.TrainingArguments`, and its `defaults` are
some of theirs. A method `idle` says which options have no effect beside the others, and why; a class says it of what it
declares, or knows more of.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trimtab.cli.parser import Parser, choice, underscored
from trimtab.errors import InvalidOption
from trimtab.options import check_effects, check_required, meant

__all__ = ["add_options", "read_options"]

T = TypeVar("T")


def add_options(parser: Parser, options: type) -> None:
    """Add a flag for each field; nothing is set for flags that are not given."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name == "training":
            _add_training(parser, field.metadata.get("defaults", {}))
            continue
        kind, repeats = _kind(hints[field.name])
        text = field.metadata["help"]
        text = (text() if callable(text) else text).replace("%", "%%")
        if field.metadata.get("required"):
            text += " (required)"
        elif field.default not in (None, (), False, "") and "[default" not in text:
            text += f" [default: {field.default}]"
        metavar, read = _metavar(field, kind), kind
        if "choices" in field.metadata:
            metavar, read = "{" + ",".join(field.metadata["choices"]) + "}", choice(field.metadata["choices"])
        if field.metadata.get("verbatim"):
            parser.verbatim.add(f"--{field.name}")
        if kind is bool:
            parser.add_argument(f"--{field.name}", nargs="?", const=True, type=_boolean, metavar="BOOL", help=text)
        else:
            parser.add_argument(
                f"--{field.name}", action="append" if repeats else "store", type=read, metavar=metavar, help=text
            )


def read_options(options: type[T], given: dict[str, Any]) -> T:
    """Options from flags, over the configuration file's, over the defaults.

    Args:
        options: the dataclass.
        given: the flags that were given, and maybe `config`.

    Raises:
        InvalidOption: the configuration file cannot be read or has an unknown key, something required is missing, or an option
            has no effect beside the others.
    """
    given = dict(given)
    values = _read_config(options, given.pop("config")) if "config" in given else {}
    values |= given
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    check_required(options, values)
    training = {name: values.pop(name) for name in list(values) if name not in fields}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    made = options(**known, **({"training": training} if "training" in fields else {}))
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
    """The type of one value, and whether the flag repeats."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _metavar(field: "dataclasses.Field[Any]", kind: type) -> str:
    return str(field.metadata.get("metavar") or {int: "N", float: "X"}.get(kind, "TEXT"))


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def _add_training(parser: Parser, defaults: Mapping[str, Any]) -> None:
    from transformers import TrainingArguments

    from trimtab.train.arguments import DEFAULTS, IDLE, OWNED

    group = parser.add_argument_group("transformers.TrainingArguments", "as in TRL; see transformers' documentation")
    taken = {action.dest for action in parser._actions}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in OWNED | IDLE or field.name in taken:
            continue
        default = {**DEFAULTS, **defaults}.get(field.name, None if field.default is dataclasses.MISSING else field.default)
        kind = _training_kind(field.type)
        text = "" if default is None else f"[default: {getattr(default, 'value', default)}]"
        if kind is bool:
            group.add_argument(f"--{field.name}", nargs="?", const=True, type=_boolean, metavar="BOOL", help=text)
        else:
            group.add_argument(f"--{field.name}", type=kind, metavar=str(kind.__name__).upper(), help=text)


def _training_kind(hint: Any) -> type:
    """What a value is converted to; what is neither a number nor a truth value stays text, as transformers parses it."""
    kinds = [kind for kind in typing.get_args(hint) or [hint] if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, bool) else str
