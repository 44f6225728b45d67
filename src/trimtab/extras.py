"""Packages that only a part of Trimtab needs come with extras of it: what needs one that is not here says which."""

import importlib
import importlib.util

from trimtab.errors import InvalidOption
from trimtab.reasons import reason_of

__all__ = ["how_to_install", "is_here", "need"]


def need(extra: str, what: str, *modules: str) -> None:
    """Import what an extra brings, or refuse what cannot be done without it.

    Args:
        extra: its name in `pyproject.toml`.
        what: what needs it, as the beginning of a sentence.
        modules: what is imported.

    Raises:
        InvalidOption: one of them is missing, or cannot be imported; the message says how to install the extra.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name
            why = f"{error.name} is missing" if missing else f"{name} cannot be imported: {reason_of(error)}"
            raise InvalidOption(f"{what} needs the extra '{extra}' ({why}): {how_to_install(extra)}") from error


def is_here(module: str) -> bool:
    """Whether a package is installed; it is not imported. A folder of that name in the working directory is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def how_to_install(extra: str) -> str:
    """The command, for messages."""
    return f"pip install 'trimtab[{extra}]'"
