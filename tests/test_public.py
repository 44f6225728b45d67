"""The public surface: what `trimtab` exports, what importing it costs, and the tree of errors."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab
from trimtab import errors
from trimtab.cli import COMMANDS

ROOT = Path(trimtab.__file__).parent
INSIDE_VLLM = {f"trimtab.vllm.{name}" for name in ("command", "internals", "processor")}
"""Modules that only vLLM's environment can import; tests_vllm/ checks their exports there."""
MODULES = sorted({info.name for info in pkgutil.walk_packages([str(ROOT)], "trimtab.")} - INSIDE_VLLM)


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_the_public_names_are_these():
    assert trimtab.__all__ == [
        "AlignedModel",
        "Aligner",
        "BlendOptions",
        "Completion",
        "EvalOptions",
        "EvolveOptions",
        "FitWeightsOptions",
        "Particles",
        "ProposeOptions",
        "SamplingParams",
        "Score",
        "SequenceLevel",
        "TextHandover",
        "TokenEvent",
        "TokenLogprobs",
        "TrainOptions",
        "TrimtabError",
        "blend",
        "evaluate",
        "evolve",
        "fit_weights",
        "propose",
        "train",
    ]


@pytest.mark.parametrize("name", trimtab.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(trimtab, name).__name__.removeprefix("trimtab.") == name
    assert getattr(trimtab, name).__doc__
    assert name in dir(trimtab)


def test_a_star_import_brings_exactly_them():
    assert in_a_fresh_python(
        "before = set(globals()) | {'before'}\nfrom trimtab import *\nprint(sorted(set(globals()) - before))"
    ) == str(trimtab.__all__)


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'trimtab' has no attribute 'NoSuchName'"):
        _ = trimtab.NoSuchName  # type: ignore[attr-defined]


def test_importing_trimtab_imports_nothing_but_the_standard_library():
    """So it is cheap: no torch, no transformers. A name that needs them brings them."""
    new = in_a_fresh_python(
        "import sys\nbefore = set(sys.modules)\nimport trimtab\ntrimtab.TrimtabError, trimtab.__version__, dir(trimtab)\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    ).split()
    assert set(new) - set(sys.stdlib_module_names) == {"trimtab"}
    assert in_a_fresh_python("import sys, trimtab\ntrimtab.SamplingParams\nprint('torch' in sys.modules)") == "True"


HEAVY = ("torch", "transformers", "tokenizers", "numpy", "httpx2")
"""What takes long to import."""
MOST_SECONDS = 0.3
"""Of processor time, above that of a bare Python: what else runs on the machine does not count."""
SHOWN = sorted(set(COMMANDS) - {"train", "start", "distil", "evolve"})
"""Commands whose `--help` needs nothing heavy; that of the others shows the fields of `transformers.TrainingArguments`."""
TIMED = f"""
import contextlib, sys, time
start = time.process_time()
with contextlib.suppress(SystemExit):
    %s
print(time.process_time() - start, *set(sys.modules) & {set(HEAVY)!r}, file=sys.stderr)
"""


def check_quick(code: str, says: str) -> None:
    """The fastest of three runs counts."""
    command = [sys.executable, "-c", TIMED % code]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=60, check=True) for _ in range(3)]
    for done in runs:
        assert done.stdout.startswith(says)
        assert done.stderr.split()[1:] == [], "heavy modules were imported"
    assert min(float(done.stderr.split()[0]) for done in runs) < MOST_SECONDS


def test_importing_trimtab_is_quick():
    check_quick("import trimtab; print(trimtab.__version__)", trimtab.__version__)


@pytest.mark.parametrize("words", [[], *([name] for name in SHOWN)], ids=lambda words: words[0] if words else "trimtab")
def test_help_is_quick(words):
    check_quick(f"from trimtab.cli import main; main([*{words!r}, '--help'])", f"usage: {' '.join(['trimtab', *words])} [-h]")


@pytest.mark.parametrize("name", ["trimtab", *MODULES])
def test_the_exports_of_every_module_exist(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    missing = [export for export in exported if not hasattr(module, export)]
    assert not missing


def test_every_module_that_defines_public_names_says_which():
    """A package's `__init__` may be a docstring alone."""
    silent = []
    for path in sorted(ROOT.rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(ast.get_docstring(ast.Module(body, [])), str), f"{path} has no docstring"
        assigned = {t.id for node in body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") for node in body)
        if defines and "__all__" not in assigned:
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_the_typing_marker_is_shipped():
    assert (ROOT / "py.typed").is_file()


def drawn_tree(docstring: str) -> dict[str, str | None]:
    """Each class of the tree in the docstring with its parent; four columns of drawing are one level."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in docstring.splitlines():
        bare = line.lstrip(" │├└─")
        drawn = line[: len(line) - len(bare)]
        if bare.startswith("TrimtabError") or "──" in drawn:
            name, depth = bare.split()[0], len(drawn) // 4 - 1
            path[depth:] = [name]
            parents[name] = path[depth - 1] if depth else None
    return parents


def test_the_tree_of_errors_is_the_one_drawn():
    assert errors.__doc__ is not None
    drawn = drawn_tree(errors.__doc__)
    assert sorted(drawn) == sorted(errors.__all__)
    for name, parent in drawn.items():
        cls = getattr(errors, name)
        if parent is None:
            assert cls.__bases__ == (Exception,)
        else:
            assert cls.__bases__[0] is getattr(errors, parent)
        assert cls.__doc__
    assert trimtab.TrimtabError is errors.TrimtabError


def test_wrong_values_are_value_errors_too():
    values = {name for name in errors.__all__ if issubclass(getattr(errors, name), ValueError)}
    assert values == {"InvalidRequest", "InvalidOption"}


def test_every_error_is_caught_by_the_root_and_keeps_its_message():
    for name in errors.__all__:
        with pytest.raises(errors.TrimtabError, match=r"^what went wrong$"):
            raise getattr(errors, name)("what went wrong")
