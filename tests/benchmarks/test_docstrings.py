"""Docstrings as a task: what is taken, and that nothing held out was learnt."""

import json
from pathlib import Path

import pytest

from real_study import study_module
from trimtab.errors import DataError

chats, docstrings = study_module("chats"), study_module("docstrings")

SOURCE = '''
def kept(a, *, b: int = 1) -> str:
    """Return a text of
    two lines.

    More of it.
    """

def unfinished(a):
    """Return what is not ended by a full stop"""

def short():
    """Too short."""

async def waits(self):
    """Wait until something happens."""
'''


def test_first_paragraphs_of_a_moderate_length_are_taken(tmp_path: Path):
    (tmp_path / "some.py").write_text(SOURCE)
    found = list(docstrings.functions(tmp_path / "some.py", "some"))
    assert [(one.signature, one.docstring) for one in found] == [
        ("def kept(a, *, b: int=1) -> str:", "Return a text of two lines."),
        ("def waits(self):", "Wait until something happens."),
    ]
    (tmp_path / "broken.py").write_text("def (:")
    assert list(docstrings.functions(tmp_path / "broken.py", "broken")) == []


def test_modules_docstrings_and_learnt_signatures_are_in_one_part():
    """Sixty modules of twenty functions; a signature that all modules have is in training alone."""
    found = [
        docstrings.Function(f"m{m}", f"def f{i if i else ''}_{m if i else ''}():", f"Docstring {i} of {m}.")
        for m in range(60)
        for i in range(20)
    ]
    parts = docstrings.split([*found, docstrings.Function("m0", "def again():", "Docstring 1 of 1.")])
    assert {name: len(chosen) for name, chosen in parts.items()} == docstrings.SIZES
    for field in ("module", "docstring", "signature"):
        sets = [{getattr(one, field) for one in chosen} for chosen in parts.values()]
        assert sum(map(len, sets)) == len(set.union(*sets)), field
    assert "def f_():" in {one.signature for one in parts["train"]}
    assert parts == docstrings.split(found)


def test_parts_are_written_once_and_belong_to_their_source(tmp_path: Path):
    made = []

    def make(path: Path):
        made.append(path)
        return {"train": [{"prompt": chats.question("a"), "completion": chats.answer("é")}], "test": []}

    task = chats.Task("some", make, "", 8, file="some.jsonl")
    with pytest.raises(DataError, match=r"needs some\.jsonl in the folder that --data names, which is None"):
        task.prepare(tmp_path / "out", None)
    (tmp_path / "some.jsonl").write_text("1")
    task.prepare(tmp_path / "out", tmp_path)
    task.prepare(tmp_path / "out", tmp_path)
    assert made == [tmp_path / "some.jsonl"]
    assert chats.read_part(tmp_path / "out", "train")[0]["completion"][0]["content"] == "é"
    assert chats.read_part(tmp_path / "out", "transfer") == []
    (tmp_path / "some.jsonl").write_text("2")
    with pytest.raises(DataError, match="choose another --out"):
        task.prepare(tmp_path / "out", tmp_path)


def test_parts_of_packages_stay_whatever_is_installed(tmp_path):
    """A study that goes on elsewhere, or after an upgrade, keeps the records that it began with."""

    def make(_):
        return {"train": [{"prompt": chats.question("a"), "completion": chats.answer("b")}]}

    chats.Task("some", make, "", 8, sources=("numpy",)).prepare(tmp_path / "out", None)
    chats.Task("some", make, "", 8, sources=("numpy", "torch")).prepare(tmp_path / "out", None)
    made_from = json.loads((tmp_path / "out" / "about.json").read_text())["made_from"]
    assert list(made_from) == ["numpy"]
