"""Flags and configuration files from dataclasses: a field is a flag, its metadata its help.

Field types are `str`, `int`, `float`, `bool`, one of these or None, or a tuple of one of them (the flag repeats). Metadata:
`help`, `choices`, `required`. A field named `training` stands for the fields of `transformers.TrainingArguments`.
"""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

__all__ = ["UsageError", "add_options", "option", "read_options"]

T = TypeVar("T")


class UsageError(Exception):
    """The command line or its configuration file is wrong."""


def option(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field with help; `required`, `choices` and `metavar` may follow."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a flag for each field; nothing is set for flags that are not given."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name == "training":
            _add_training(parser)
            continue
        kind, repeats = _kind(hints[field.name])
        text = field.metadata["help"].replace("%", "%%")
        if field.metadata.get("required"):
            text += " (required)"
        elif field.default not in (None, (), False, "") and "[default" not in text:
            text += f" [default: {field.default}]"
        more = {"choices": field.metadata["choices"]} if "choices" in field.metadata else {}
        if kind is bool:
            parser.add_argument(f"--{field.name}", nargs="?", const=True, type=_boolean, metavar="BOOL", help=text)
        elif repeats:
            parser.add_argument(f"--{field.name}", action="append", type=kind, metavar=_metavar(field, kind), help=text, **more)
        else:
            name = None if more else _metavar(field, kind)
            parser.add_argument(f"--{field.name}", type=kind, metavar=name, help=text, **more)


def read_options(options: type[T], given: dict[str, Any]) -> T:
    """Options from flags, over the configuration file's, over the defaults.

    Args:
        options: the dataclass.
        given: the flags that were given, and maybe `config`.

    Raises:
        UsageError: the configuration file cannot be read or has an unknown key, or something required is missing.
    """
    given = dict(given)
    values = _read_config(options, given.pop("config")) if "config" in given else {}
    values |= given
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    for name, field in fields.items():
        if field.metadata.get("required") and values.get(name) in (None, [], ""):
            raise UsageError(f"--{name} is required")
    training = {name: values.pop(name) for name in list(values) if name not in fields}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return options(**known, **({"training": training} if "training" in fields else {}))


def _read_config(options: type, path: str) -> dict[str, Any]:
    """The file's values, converted by the same parser as flags."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: must hold a mapping of options")
    parser = _ConfigParser(prog=path, argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    add_options(parser, options)
    known = {action.dest for action in parser._actions}
    repeated = {action.dest for action in parser._actions if isinstance(action, argparse._AppendAction)}
    words = []
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"--config {path}: there is no option '{key}'")
        if isinstance(value, list) and key not in repeated:
            raise UsageError(f"--config {path}: {key} takes one value, not a list")
        if any(isinstance(item, (dict, list)) for item in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config {path}: {key} takes plain values, not {value!r}")
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                words += [f"--{key}={item}"]
    return vars(parser.parse_args(words))


class _ConfigParser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"--config {self.prog}: {message}")


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


def _add_training(parser: argparse.ArgumentParser) -> None:
    from transformers import TrainingArguments

    from trimtab.train.arguments import DEFAULTS, OWNED

    group = parser.add_argument_group("transformers.TrainingArguments", "as in TRL; see transformers' documentation")
    taken = {action.dest for action in parser._actions}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in OWNED or field.name in taken:
            continue
        default = DEFAULTS.get(field.name, None if field.default is dataclasses.MISSING else field.default)
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
