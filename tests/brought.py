"""A package of somebody else's, installed for a test: a folder on `sys.path` with a module and entry points of its own."""

import sys
from collections.abc import Mapping
from importlib import invalidate_caches
from pathlib import Path


def look_again(registry, monkeypatch) -> None:
    """Let a registry find for one test what `bring` is about to install."""
    list(registry)
    monkeypatch.setattr(registry, "_known", dict(registry._known))
    monkeypatch.delitem(vars(registry), "_brought")


def bring(
    folder: Path, monkeypatch, module: str, source: str, points: Mapping[str, Mapping[str, str]], package: str = ""
) -> None:
    """Install a package for a test: `importlib.metadata` finds it, and so do processes that inherit PYTHONPATH.

    Args:
        folder: an empty one.
        monkeypatch: pytest's.
        module: its only module.
        source: the module's text.
        points: by group, entry points by name, such as {"trimtab.rules": {"mine": "module:Mine"}}.
        package: its name; default: the module's.
    """
    package = package or module
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    sections = ("\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in named.items())]) for group, named in points.items())
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.delitem(sys.modules, module, raising=False)
    invalidate_caches()
