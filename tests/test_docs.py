"""What the documentation shows is true: its code runs, and its links lead somewhere."""

import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from brought import bring, look_again
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core import rules
from trimtab.decode.drafters import DRAFTERS
from trimtab.errors import DeadRow, InvalidOption
from trimtab.judges.rewards.making import make_rewards
from trimtab.models.table import TableLM
from trimtab.serve.playground.votes import VoteBook

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_rule_of_the_tutorial_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """docs/rules.md as a package of somebody else's: found by its name, parsed with its setting, decoded."""
    (_, source), (points,) = blocks("rules.md", "python"), blocks("rules.md", "toml")
    look_again(rules.RULES, monkeypatch)
    bring(tmp_path, monkeypatch, "my_rules", source, tomllib.loads(points)["project"]["entry-points"])
    gate = rules.parse_rule("entropy_gate(nats=1.05)")
    logp = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.3, 0.4]], dtype=torch.float64).log()
    logq = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]], dtype=torch.float64).log()
    target = gate(logp, [logq], [1.0])
    assert_close(target[0], logp[0])
    assert_close(target[1], rules.Product()(logp[1], [logq[1]], [1.0]))
    for shut in (0, 1):
        with pytest.raises(DeadRow):
            gate(logp[shut], [torch.full_like(logq[shut], torch.nan)], [1.0])
    model = AlignedModel(TableLM.random(5, seed=0), [TableLM.random(5, seed=1)], rule="entropy_gate(nats=1.05)")
    assert len(model.generate([[1]], SamplingParams(max_tokens=4, seed=0))[0].tokens) == 4


def test_the_hand_over_between_tokenizers_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, letters in (("SMALL", "TEX abc"), ("BIG", "XET abcdef")):
        save_tiny(tmp_path / name, tiny_model("llama", len(letters) + 1), tiny_tokenizer(letters))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks("rules.md", "python")[0], "docs/rules.md", "exec"), names)
    assert names["answer"].finish_reason in ("stop", "length")


def test_the_rule_of_the_page_on_extending_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installed as a package, and tested by the page's own test."""
    source, test, *_ = blocks("extending.md", "python")
    points = blocks("extending.md", "toml")[0]
    look_again(rules.RULES, monkeypatch)
    bring(tmp_path, monkeypatch, "handover_rule", source, tomllib.loads(points)["project"]["entry-points"])
    exec(compile(test, "docs/extending.md", "exec"), {})
    model = AlignedModel(TableLM.random(5, seed=0), [TableLM.random(5, seed=1)], rule="hand_over(window=2, threshold=-3.0)")
    assert model.generate([[1]], SamplingParams(max_tokens=9, seed=0))[0].fallbacks > 0
    with pytest.raises(InvalidOption, match="rule: hand_over: window must be at least 1, not 0"):
        rules.parse_rule("hand_over(window=0)")


def test_the_drafter_of_the_page_on_extending_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installed as a package, tested by the page's own test, and asked for by its name."""
    source, test = blocks("extending.md", "python")[2:4]
    points = blocks("extending.md", "toml")[1]
    look_again(DRAFTERS, monkeypatch)
    bring(tmp_path, monkeypatch, "phrases", source, tomllib.loads(points)["project"]["entry-points"])
    names = {"Phrases": DRAFTERS["phrases"]}
    exec(compile(test, "docs/extending.md", "exec"), names)
    (tmp_path / "words.txt").write_text("abca", encoding="utf-8")
    model = AlignedModel(TableLM.random(7, seed=0), tokenizer=tiny_tokenizer("abcdef"), draft=f"phrases:{tmp_path}/words.txt")
    assert model.models.drafter == DRAFTERS["phrases"]((1, 2, 3, 1))
    with pytest.raises(InvalidOption, match="draft: there is no file 'None'; say phrases:FILE"):
        AlignedModel(TableLM.random(7, seed=0), tokenizer=tiny_tokenizer("abcdef"), draft="phrases")


def test_the_validator_of_the_page_on_rewards_works_as_written(tmp_path: Path):
    """As a file that `--reward` names."""
    (tmp_path / "checks.py").write_text(blocks("rewards.md", "python")[0], encoding="utf-8")
    reward = make_rewards([f"{tmp_path / 'checks.py'}:valid"], options={})
    texts, keys = ['{"a": 1, "b": 2}', '{"a": 1}', "no", "[1]"], [{"keys": ["b", "a"]}] * 4
    assert reward.score(["p"] * 4, texts, keys) == [1.0, 0.0, 0.0, 0.0]


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


# ---- docs/serving.md, command by command


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `demo-out` holds what the demo makes, tiny."""
    folder = tmp_path_factory.mktemp("docs")
    letters = "".join(map(chr, range(32, 127))) + "\n"
    for i, name in enumerate(("proposal", "aligner", "sft_aligner")):
        model = tiny_model("llama", len(letters) + 1, seed=i, spread=0.2, max_position_embeddings=256)
        save_tiny(folder / "demo-out" / name, model, tiny_tokenizer(letters))
    return folder


@pytest.mark.slow
def test_every_command_of_the_page_on_serving_works(demo_out: Path):
    start, *rest = blocks("serving.md", "bash")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace("8000", port)],
            cwd=demo_out,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    server = subprocess.Popen(["bash", "-c", f"exec {start.replace('8000', port)}"], cwd=demo_out, env=environment)
    try:
        health, ask, manage, metrics = map(run, rest)
        assert '"status":"ready"' in health
        assert '"id":"docs"' in health
        assert '"model":"docs"' in ask
        assert '"deleted":true' in manage
        assert 'trimtab:generation_tokens_total{model_name="docs"}' in metrics
        (program,) = blocks("serving.md", "python")
        shown = subprocess.run(
            [sys.executable, "-c", program.replace("8000", port)], env=environment, capture_output=True, text=True, timeout=120
        )
        assert shown.returncode == 0, shown.stderr
        assert len(shown.stdout) > 20
        page = urllib.request.urlopen(f"http://localhost:{port}/playground/").read().decode()
        assert "Trimtab" in page
    finally:
        server.terminate()
        assert server.wait(60) == 0


@pytest.mark.slow
def test_votes_of_the_arena_train_an_aligner_by_the_pages_command(demo_out: Path):
    (command,) = (block for block in blocks("serving.md", "sh") if block.startswith("trimtab train"))
    book = VoteBook(demo_out / "votes.jsonl")
    for i in range(12):
        book.append(f"def f{i}():", f"left {i}", f"right {i}", "left" if i % 2 else "right")
    words = shlex.split(command)
    assert words[0] == "trimtab"
    short = ["--max_steps", "2", "--per_device_train_batch_size", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *words[1:], *short],
        cwd=demo_out,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (demo_out / "better" / "trimtab.json").is_file()
