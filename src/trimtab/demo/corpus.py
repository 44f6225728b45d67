"""The standard library as data: source to pretrain on, and signatures with their docstrings to align with.

Modules are dealt to three sides by a hash of their name, so that nothing the aligner is judged on was seen by anyone:
`pretrain` for the models' source, `align` for the aligner's docstrings, `held_out` for judging.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Corpus", "read_corpus"]

SHARES = {"held_out": 0.1, "align": 0.45, "pretrain": 0.45}
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data", "turtledemo"}


class Corpus(NamedTuple):
    """What the demo trains on and is judged by."""

    pretrain: list[str]
    """Source of whole modules."""
    align: list[dict[str, str]]
    """Records with `prompt` (a signature up to the opening quotes) and `completion` (a docstring's first paragraph)."""
    held_out: list[dict[str, str]]
    """The same from other modules."""


def read_corpus(root: Path | None = None) -> Corpus:
    """Read every module below the standard library's folder, in a fixed order."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    sides: dict[str, list[str]] = {side: [] for side in SHARES}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            sides[_side(name.as_posix())].append(path.read_text(encoding="utf-8", errors="ignore"))
    align, held_out = (
        list({record["prompt"]: record for source in sides[side] for record in _docstrings(source)}.values())
        for side in ("align", "held_out")
    )
    seen = {record["prompt"] for record in align}  # __init__(self): stands in many modules
    return Corpus(sides["pretrain"], align, [record for record in held_out if record["prompt"] not in seen])


def _side(name: str) -> str:
    """The side that a module is on, for ever."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    for side, share in SHARES.items():
        if place < share:
            return side
        place -= share
    return "pretrain"


def _docstrings(source: str) -> Iterator[dict[str, str]]:
    """Signatures and docstrings of the functions in a module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module may hold odd escapes on purpose
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
            if 10 < len(paragraph) <= 300:
                yield {"prompt": f'def {node.name}({ast.unparse(node.args)}):\n    """', "completion": paragraph}
