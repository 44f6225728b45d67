"""How a rule is read from text: `str` of a rule writes what `parse_rule` reads.

    product    candidates(n=8)    gate(rule=nucleus(force_eos=True), by=kl)

Settings stand in brackets, with commas between them, or semicolons, for lines that commas divide already. One that is a rule is
written as rules are, so brackets nest.
"""

import ast
import dataclasses
import re
from typing import Any

from trimtab.core.rules.base import PLAIN, RULES, Rule
from trimtab.errors import InvalidOption

__all__ = ["MAX_TEXT", "parse_rule"]

MAX_TEXT = 200
"""Characters that any rule with its settings fits in."""

PIECE = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[(),;'"]|[^(),;'"]+""")
"""What a text is made of: texts in quotes, which may hold all of these; brackets, commas, semicolons, quotes; and the rest."""


def parse_rule(text: str | Rule) -> Rule:
    """Read a rule as `str` writes it: `product`, `candidates(n=8)`, `kl_gate(tau=0.2)`, `gate(rule=mixture, by=entropy)`.

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
    for part in _parts(text, rest.removesuffix(")")):
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


def _parts(text: str, settings: str) -> list[str]:
    """What stands between the commas and semicolons that are in no bracket and in no quotes."""
    parts, depth = [""], 0
    for piece in PIECE.findall(settings):
        if piece in ("'", '"'):
            raise InvalidOption(f"rule: '{text}' lacks a closing quote")
        depth += (piece == "(") - (piece == ")")
        if depth < 0:
            raise InvalidOption(f"rule: '{text}' has a closing bracket too many")
        if piece in (",", ";") and not depth:
            parts.append("")
        else:
            parts[-1] += piece
    if depth:
        raise InvalidOption(f"rule: '{text}' lacks its closing bracket")
    return [part for part in map(str.strip, parts) if part]


def _read_setting(rule: str, field: "dataclasses.Field[Any]", text: str) -> Any:
    if isinstance(field.default, Rule):
        return parse_rule(text)
    kind = type(field.default)
    if kind is str and PLAIN.fullmatch(text):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        value = float(value) if kind is float and type(value) is int else value
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):
        value = None
    if type(value) is not kind:
        raise InvalidOption(f"rule: '{rule}' wants {field.name} as {kind.__name__}, not '{text}'")
    return value
