"""Functions that a text names: `MODULE.py:FUNCTION` or `package.module:FUNCTION`.

Both a command and the processes that work for it import them here.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from trimtab.errors import InvalidOption
from trimtab.files import expand_home

__all__ = ["Found", "digest", "find_function"]


class Found(NamedTuple):
    """A function, imported."""

    function: Callable[..., Any]
    name: str
    """Its module's name and its own."""
    fingerprint: str | None
    """A digest of its source file and its name; None where it has no file."""


def find_function(text: str) -> Found:
    """Import the function that a text names.

    Raises:
        InvalidOption: it names none, or its module cannot be imported.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise InvalidOption(f"'{text}' is no function: give MODULE.py:FUNCTION or package.module:FUNCTION")
    module = _from_file(where) if where.endswith(".py") else _by_name(where)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InvalidOption(f"{where} has no function '{name}'; it has: {', '.join(there) or 'none'}")
    file = getattr(module, "__file__", None)
    fingerprint = digest(Path(file).read_bytes(), name) if file is not None else None
    return Found(function, f"{module.__name__.rpartition('.')[2]}.{name}", fingerprint)


def digest(source: bytes, name: str) -> str:
    """What tells a function of this source and this name from others."""
    return "sha256:" + hashlib.sha256(source + b"\0" + name.encode()).hexdigest()


def _from_file(where: str) -> ModuleType:
    path = expand_home(where)
    if not path.is_file():
        raise InvalidOption(f"there is no file '{where}' with a reward function")
    name = f"trimtab_reward_{hashlib.sha256(bytes(path.absolute())).hexdigest()[:16]}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidOption(f"'{where}' is no module of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    with _importing(where, path.absolute().parent):
        spec.loader.exec_module(module)
    return module


def _by_name(where: str) -> ModuleType:
    with _importing(where, Path.cwd()):
        return importlib.import_module(where)


@contextmanager
def _importing(where: str, folder: Path) -> Iterator[None]:
    """Import with what lies beside at hand, as a script would; whatever is raised becomes an error of the option."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except Exception as error:  # whatever somebody's module raises
        raise InvalidOption(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        with suppress(ValueError):  # it may have changed the path itself
            sys.path.remove(str(folder))
