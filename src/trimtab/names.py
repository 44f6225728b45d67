"""What users call aligners, in commands, files and requests."""

import re
from pathlib import Path

from trimtab.errors import InvalidOption

__all__ = ["NAME", "parse_named"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What an aligner may be called."""


def parse_named(text: str) -> tuple[str, str]:
    """`NAME=PATH`; a bare path is called by its last part.

    Raises:
        InvalidOption: there is no name or no path.
    """
    name, equals, path = text.partition("=")
    if not equals:
        name, path = Path(text).name, text
    if not NAME.fullmatch(name) or not path:
        letters = "up to 128 letters, digits, '.', '_' and '-'"
        raise InvalidOption(f"--aligner must be NAME=PATH with a name of {letters}, not '{text}'")
    return name, path
