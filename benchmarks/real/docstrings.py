"""Docstrings of the standard library: the first paragraph, from the signature.

Modules are dealt to the parts, so a held-out function comes from a module of which nothing was learnt. `transfer` holds
functions of other packages, as a check that more was learnt than the standard library's manner.
"""

import ast
import importlib.util
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from chats import Record, Task, answer, place, question

__all__ = ["TASK", "Function", "functions", "split"]

SIZES = {"train": 600, "dev": 60, "test": 100}
PACKAGES = {"numpy": 34, "torch": 33, "transformers": 33}
"""Functions that are taken from each."""
PER_FILE = 2
"""Of one file of a package, so that they come from many."""

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__phello__"}
LEFT_OUT |= {"ensurepip", "distutils", "testing"}

WORDS = range(4, 41)
"""Lengths of a paragraph that is wanted."""
SIGNATURE = 200
"""Most characters of a signature."""

SYSTEM_PROMPT = (
    "You write docstrings. Given the signature of a Python function, reply with the first sentence of its docstring and nothing"
    " else: what the function does, in one or two plain sentences that end with a full stop. No code, no quotes, no list."
)


class Function(NamedTuple):
    """A function that has a docstring."""

    module: str
    """The name of the top-level module, or of the file in a package."""
    signature: str
    docstring: str
    """The first paragraph, in one line."""

    @property
    def record(self) -> Record:
        """As a chat."""
        prompt = question(f"Write the docstring of this Python function.\n\n{self.signature}")
        return {"prompt": prompt, "completion": answer(self.docstring), "group": self.signature}


def make(_: Path | None) -> dict[str, list[Record]]:
    """All parts."""
    root = Path(sysconfig.get_paths()["stdlib"])
    own = [one for path in _files(root) for one in functions(path, path.relative_to(root).parts[0].removesuffix(".py"))]
    parts = split(own)
    seen = {text for one in own for text in (one.docstring, one.signature)}
    parts["transfer"] = [one for name, count in PACKAGES.items() for one in _of_package(name, count, seen)]
    return {name: [one.record for one in chosen] for name, chosen in parts.items()}


def split(found: Iterable[Function]) -> dict[str, list[Function]]:
    """Functions by part: each docstring once, each module in one part only, and no signature that training has in another."""
    once: dict[str, Function] = {}
    for one in found:
        once.setdefault(one.docstring, one)
    parts: dict[str, list[Function]] = {name: [] for name in SIZES}
    for one in once.values():
        where = place(f"m{one.module}")
        parts["test" if where < 0.2 else "dev" if where < 0.3 else "train"].append(one)
    for chosen in parts.values():
        random.Random(0).shuffle(chosen)
    training = parts["train"][: SIZES["train"]]
    learnt = {one.signature for one in training}
    held_out = {name: [one for one in parts[name] if one.signature not in learnt] for name in ("dev", "test")}
    return {"train": training} | {name: chosen[: SIZES[name]] for name, chosen in held_out.items()}


def functions(path: Path, module: str) -> Iterator[Function]:
    """Those of a source file whose docstrings begin with a whole paragraph of a moderate length."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file may hold odd escapes on purpose
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # files that are there to be broken
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            paragraph = " ".join(text.split("\n\n")[0].split())
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            signature = f"def {node.name}({ast.unparse(node.args)}){returns}:"
            if paragraph.endswith(".") and len(paragraph.split()) in WORDS and len(signature) <= SIGNATURE:
                yield Function(module, signature, paragraph)


def _files(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]


def _of_package(name: str, count: int, seen: set[str]) -> list[Function]:
    """Some functions of an installed package, neither docstring nor signature seen; what is taken is seen from then on."""
    spec = importlib.util.find_spec(name)  # imports nothing
    root = Path(next(iter(spec.submodule_search_locations)))
    found: list[Function] = []
    for path in sorted(_files(root), key=lambda path: place(path.relative_to(root).as_posix())):
        most = min(len(found) + PER_FILE, count)
        for one in functions(path, path.name):
            if len(found) < most and not seen & {one.docstring, one.signature}:
                seen |= {one.docstring, one.signature}
                found.append(one)
        if len(found) == count:
            break
    return found


TASK = Task("docstrings", make, SYSTEM_PROMPT, 64, sources=("python", *PACKAGES))
