"""docs/extending.md: the package with judges and rewards that it shows, installed, works by the commands that it shows."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from eval_task import called, make_eval_task, read
from rewards_of import package
from tiny_task import write_rows

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8").partition("## Judges and rewards")[2]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    judge, function, reward = blocks("python")
    points = {}
    for block in blocks("toml"):
        points |= tomllib.loads(block)["project"]["entry-points"]
    (tmp_path / "rewards.py").write_text(function, encoding="utf-8")
    with package(tmp_path / "package", monkeypatch, "wordless", judge + reward, points):
        yield


def test_every_command_of_the_page_works(installed, tmp_path, capsys, monkeypatch):
    task = make_eval_task(tmp_path / "task")
    monkeypatch.chdir(tmp_path)
    for name, link in (("P", "proposal"), ("A", "start")):
        (tmp_path / name).symlink_to(task / link)
    rows = [json.loads(line) for line in (task / "prompts.jsonl").read_text(encoding="utf-8").splitlines()][:4]
    write_rows(tmp_path / "prompts.jsonl", rows)
    write_rows(tmp_path / "questions.jsonl", [row | {"answer": "xyz"} for row in rows])
    judges = []
    for command in (line for block in blocks("sh") for line in block.splitlines()):
        program, *words = shlex.split(command)
        assert program == "trimtab"
        status, _, errors = called(capsys, *words, "--max_tokens", 4)
        assert (status, errors) == (0, [])
        if words[0] == "eval":
            judges += [row["judge"] for row in read(tmp_path / "results" / "results.json")["judging"] if row["pair"] == "main"]
    assert judges == ["fewer_words-100", "rewards.exact", "mentions-please"]
    shown = " ".join(called(capsys, "eval", "--help")[1].split())
    assert "fewer_words: N, the answer with fewer words wins" in shown
    assert "mentions: WORD" in " ".join(called(capsys, "propose", "--help")[1].split())
    words = ["eval", "--proposal", "P", "--aligner", "A", "--dataset", "prompts.jsonl", "--out", "other"]
    status, _, errors = called(capsys, *words, "--judge", "fewer_words:a")
    assert (status, "give the most words" in errors[0]) == (2, True)
