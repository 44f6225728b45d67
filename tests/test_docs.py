"""What the documentation shows is true: its code runs, and its links lead somewhere."""

import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from trimtab import AlignedModel, SamplingParams
from trimtab.core import rules
from trimtab.core.logprobs import entropy
from trimtab.models.table import TableLM

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_rule_of_the_tutorial_works_as_written(monkeypatch: pytest.MonkeyPatch):
    """docs/rules.md, pasted into rules.py: registered, parsed with its setting, decoded."""
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    monkeypatch.setattr(rules, "entropy", entropy, raising=False)
    names = dict(vars(rules))
    exec(compile(textwrap.dedent(block.group(1)), "docs/rules.md", "exec"), names)
    gate = rules.parse_rule("entropy_gate(nats=1.05)")
    logp = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
    logq = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]], dtype=torch.float64).log()
    target = gate(logp, [logq], [1.0])
    assert_close(target[0], logp[0])
    assert_close(target[1], rules.Product()(logp[1], [logq[1]], [1.0]))
    model = AlignedModel(TableLM.random(5, seed=0), [TableLM.random(5, seed=1)], rule="entropy_gate(nats=1.05)")
    assert len(model.generate([[1]], SamplingParams(max_tokens=4, seed=0))[0].tokens) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_in_the_readme_names_what_is_there():
    """Every module and package named in the README's tree exists, and every package is named."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2]
    named = {*re.findall(r"(\w+\.py)\b", tree), *re.findall(r"^ {6}(\w+/)", tree, re.MULTILINE)}
    source = ROOT / "src" / "trimtab"
    there = {path.name for path in source.rglob("*.py")} | {f"{path.name}/" for path in source.iterdir() if path.is_dir()}
    assert named <= there
    packages = {f"{path.parent.name}/" for path in source.glob("*/__init__.py")}
    assert packages <= named


def test_readme_python_runs_up_to_its_imports():
    """The ten lines of Python parse, and use names that exist."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block
    code = compile(block.group(1), "README.md", "exec")
    assert {"AlignedModel", "SamplingParams"} <= set(code.co_names)
    assert all(hasattr(AlignedModel, name) for name in ("from_pretrained", "generate", "stream", "score"))
    assert sys.version_info >= (3, 11)
