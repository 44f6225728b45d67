"""Packages that are called: `trimtab.train(...)` trains, and `trimtab.train.trainer` is a module; Python has one name for both.

Type checkers see the function, which `trimtab/__init__.py` imports for them; at run time it is imported by the first call.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

__all__ = ["make_callable"]


class _CallableModule(ModuleType):
    """A package with a function of its name."""

    __function__: str
    """`module:name` of the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._find()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function, for `inspect` and so for `help` in notebooks."""
        return inspect.signature(self._find())

    def _find(self) -> Any:
        module, _, name = self.__function__.partition(":")
        return getattr(importlib.import_module(module), name)


def make_callable(package: str, function: str) -> None:
    """Let a package be called.

    Args:
        package: its `__name__`.
        function: `module:name` of what a call of it calls.
    """
    module = sys.modules[package]
    module.__class__ = _CallableModule
    module.__function__ = function  # type: ignore[attr-defined]
