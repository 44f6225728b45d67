"""Dependencies point one way, and no module draws from a global random generator. Read from the source, not from a run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab

ROOT = Path(trimtab.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
BELOW: dict[str, set[str]] = {"core": set()}
"""The packages that each package may import, itself apart."""
BELOW["models"] = {"core"}
BELOW["data"] = {"core", "models"}
BELOW["decode"] = {"core", "models", "data"}
BELOW["blend"] = {"core", "models"}
BELOW["endpoints"] = {"core", "models", "data", "decode"}
BELOW["rewriting"] = {"core", "models", "data", "decode"}
BELOW["users"] = {"core", "models", "data", "decode"}
BELOW["vllm"] = {"core", "models", "data", "decode"}
BELOW["serve"] = {*BELOW["users"], "users", "rewriting"}
BELOW["handover"] = {"core", "models", "data", "decode", "endpoints"}
BELOW["judges"] = {"core", "models", "data", "decode", "endpoints"}
BELOW["propose"] = {*BELOW["judges"], "judges"}
BELOW["evaluate"] = {*BELOW["judges"], "judges", "rewriting"}
BELOW["train"] = {*BELOW["propose"], "propose"}
BELOW["loop"] = {*BELOW["train"], "train", "evaluate"}
BELOW["demo"] = {*BELOW["train"], "train", "evaluate"}
BELOW["cli"] = set(BELOW)
BELOW["__main__"] = {"cli"}
GROUND = {path.stem for path in ROOT.glob("*.py")} - {"__init__"} - set(BELOW)
"""Modules beside the packages, such as `errors` and `files`: everyone may use them, and they use no package."""


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of everything that is imported at any depth; `package` is where relative imports start."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def home(path: Path) -> str:
    """The package or ground module that a file belongs to; '' for the root's `__init__`."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def offences(source: str, where: str) -> list[str]:
    """The imports of `trimtab` in a module of package or ground module `where` that go against the order."""
    wrong = []
    for name in imports(ast.parse(source), f"trimtab.{where}"):
        parts = name.split(".")
        if parts[0] != "trimtab" or name in ("trimtab.__version__", "trimtab.py.typed"):
            continue
        target = parts[1] if len(parts) > 1 else ""
        allowed = GROUND if where in GROUND else {where, *BELOW[where], *GROUND}
        if where == "core":
            allowed = {"core", "errors", "registry"}
        if target not in allowed:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", [path for path in FILES if home(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert home(path) in {*BELOW, *GROUND}, "a new package needs its place in the order"
    assert offences(path.read_text(encoding="utf-8"), home(path)) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("core", "from trimtab.models.base import State"),
        ("core", "from trimtab.files import read_json"),
        ("core", "import trimtab.decode.aligned"),
        ("models", "from trimtab.decode import prompts"),
        ("models", "def f():\n    from trimtab.decode.request import SamplingParams"),
        ("decode", "from trimtab import AlignedModel"),
        ("decode", "import trimtab"),
        ("train", "from trimtab.evaluate import intervals"),
        ("train", "from ..evaluate import intervals"),
        ("evaluate", "from trimtab.train.rows import Layout"),
        ("demo", "from trimtab.cli import main"),
        ("files", "from trimtab.core.rules import Rule"),
        ("endpoints", "from trimtab.judges.base import Judge"),
        ("data", "from trimtab.decode.request import SamplingParams"),
        ("judges", "from trimtab.evaluate import intervals"),
        ("decode", "from trimtab.endpoints.client import Endpoints"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(where, source):
    assert len(offences(source, where)) == 1


def test_imports_that_point_down_are_not_offences():
    assert offences("import torch\nfrom trimtab.core.noise import uniforms\nfrom trimtab.errors import DeadRow", "core") == []
    assert offences("from trimtab.registry import Registry", "core") == []
    assert offences("from .rules import Rule\nfrom trimtab import __version__", "core") == []
    assert offences("from trimtab.train.run import train\nfrom trimtab.evaluate import intervals", "demo") == []
    assert offences("from trimtab.demo.run import run_demo\nfrom trimtab.files import read_json", "cli") == []


# ---- circles


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which modules each module imports, at any depth of its text, by dotted names."""
    found = {}
    for name, source in sources.items():
        package = name if f"{name}.__init__" in sources else name.rpartition(".")[0]
        named = {part for full in imports(ast.parse(source), package) for part in (full, full.rpartition(".")[0])}
        found[name] = (named & sources.keys()) - {name}
    return found


def circles(needs: dict[str, set[str]]) -> set[str]:
    """The modules that need themselves, by way of others."""

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        ahead = [*needs[name]]
        while ahead:
            if (at := ahead.pop()) not in seen:
                seen.add(at)
                ahead += needs[at]
        return seen

    return {name for name in needs if name in reached(name)}


def test_no_two_modules_need_each_other():
    names = {path: ".".join(["trimtab", *path.relative_to(ROOT).with_suffix("").parts]) for path in FILES}
    sources = {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for path, name in names.items() if home(path)}
    assert circles(graph(sources)) == set()


def test_a_circle_is_found_even_if_it_is_closed_late_or_for_types_alone():
    late = {"a.one": "from a import two", "a.two": "def f():\n    from a.one import g", "a.three": "import a.two"}
    assert circles(graph(late)) == {"a.one", "a.two"}
    typed = {"a.one": "if TYPE_CHECKING:\n    from a.two import g", "a.two": "from a.three import h", "a.three": "import a.one"}
    assert circles(graph(typed)) == {"a.one", "a.two", "a.three"}


def test_files_are_short_enough_to_be_read_at_once():
    assert {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text("utf-8").splitlines())) > 400} == {}


# ---- randomness


DRAWING = {"bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like"} | {
    "randn",
    "randn_like",
    "randperm",
}
DRAWING_METHODS = {f"{name}_" for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal")} | {
    "random_",
    "uniform_",
    "multinomial",
}
GLOBAL = {"torch.manual_seed", "torch.seed", "torch.initial_seed", "torch.default_generator", "torch.set_rng_state"} | {
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "transformers.set_seed",
    "accelerate.utils.set_seed",
}
ALLOWED = {"random.Random", "numpy.random.default_rng", "numpy.random.Generator", "torch.random.fork_rng"}


def global_randomness(source: str) -> list[str]:
    """Uses of a generator that nobody passed in: seeding one, drawing without `generator=`, `random` and `numpy.random`.

    Inside `with torch.random.fork_rng():` they are allowed, for there the global generator is lent and put back.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what a name in this module stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute) and (stem := dotted(node.value)):
            return f"{stem}.{node.attr}"
        return None

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.With) and any(
            isinstance(item.context_expr, ast.Call) and dotted(item.context_expr.func) == "torch.random.fork_rng"
            for item in node.items
        ):
            return
        name = dotted(node) if isinstance(node, ast.Attribute | ast.Name) else None
        if name in GLOBAL or (
            name and name not in ALLOWED and name.startswith(("random.", "numpy.random.", "torch.random.", "secrets."))
        ):
            yield name
        if isinstance(node, ast.Call) and not any(keyword.arg == "generator" for keyword in node.keywords):
            called = dotted(node.func)
            if called and called.startswith("torch.") and called.rpartition(".")[2] in DRAWING:
                yield called
            elif called is None and isinstance(node.func, ast.Attribute) and node.func.attr in DRAWING_METHODS:
                yield f".{node.func.attr}"
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return list(walk(tree))


SECRETS = ROOT / "core" / "noise.py"
"""The one module that may ask the operating system for a seed."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_draws_from_a_global_generator(path):
    found = global_randomness(path.read_text(encoding="utf-8"))
    assert [name for name in found if not (path == SECRETS and name == "secrets.randbits")] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.manual_seed(0)",
        "from torch import manual_seed\nmanual_seed(0)",
        "import torch as t\nt.cuda.manual_seed_all(0)",
        "import torch\nx = torch.rand(3)",
        "import torch\nx = torch.multinomial(p, 1)",
        "from torch import randperm\nx = randperm(3)",
        "import torch\nx = torch.empty(3)\nx.normal_()",
        "import random\nrandom.shuffle(items)",
        "from random import choice\nchoice(items)",
        "import numpy as np\nnp.random.seed(0)",
        "from numpy import random\nrandom.rand(3)",
        "import torch\ntorch.default_generator.manual_seed(0)",
        "from transformers import set_seed\nset_seed(0)",
        "import secrets\nsecrets.token_hex()",
    ],
)
def test_a_use_of_a_global_generator_is_found(source):
    assert global_randomness(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ng = torch.Generator().manual_seed(0)\ntorch.rand(3, generator=g)\ntorch.empty(3).normal_(generator=g)",
        "import random\nrandom.Random(0).shuffle(items)",
        "import numpy as np\nnp.random.default_rng(0)",
        "import torch\nwith torch.random.fork_rng():\n    torch.manual_seed(0)",
        "from trimtab.models.table import TableLM\nTableLM.random(3, seed=0)",
        "from trimtab.core.noise import uniforms\nuniforms([0], [0], [0], 1, 1)",
    ],
)
def test_a_generator_of_ones_own_is_no_offence(source):
    assert global_randomness(source) == []
