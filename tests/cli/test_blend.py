"""`--blend weights` on command lines is the folder that `trimtab blend` makes, and says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.cli import main


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("cli"), tiny_tokenizer()
    for seed, name in enumerate(("proposal", "base")):
        save_tiny(folder / name, tiny_model("llama", 28, seed=seed, spread=0.3), tokenizer)
    for seed, name in enumerate(("med", "law")):
        save_lora(folder / name, folder / "base", seed=seed, r=2 + seed, target_modules=["q_proj", "up_proj"])
    (folder / "data.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n{"prompt": "x", "completion": "yz"}\n')
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: Any) -> Any:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_blend_as_a_folder_does(root, tmp_path, capsys):
    asked = ["--proposal", root / "proposal"]
    for name, weight in (("med", 0.7), ("law", -0.3)):
        asked += ["--aligner", root / name, "--weight", weight]
    told(
        capsys,
        "blend",
        "--vector",
        f"med={root / 'med'}:0.7",
        "--vector",
        f"law={root / 'law'}:-0.3",
        "--out",
        tmp_path / "out",
    )
    alone = ["--proposal", root / "proposal", "--aligner", tmp_path / "out"]
    how = ["--rule", "geometric", "--prompt", "hello", "--max_tokens", 8, "--seed", 1]
    one = told(capsys, "generate", *asked, "--blend", "weights", "--rule_weight", 0.4, *how)
    other = told(capsys, "generate", *alone, "--weight", 0.4, *how)
    assert one["completions"] == other["completions"]
    assert (one["weight"], one["blend"]) == ([0.4], [0.7, -0.3])
    assert "blend" not in other
    one, other = (
        told(capsys, "score", *words, "--dataset", root / "data.jsonl") for words in ([*asked, "--blend", "weights"], alone)
    )
    assert one["nll"] == pytest.approx(other["nll"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule_weight", "0.5"], "--rule_weight is for --blend weights"),
        (["--blend", "sum"], "--blend"),
        (["--blend", "weights"], "blend: weight is missing: give one number for each aligner"),
    ],
)
def test_what_would_not_be_done_is_refused(words, message, root, capsys):
    two = ["--aligner", str(root / "med"), "--aligner", str(root / "law")]
    assert main(["generate", "--proposal", str(root / "proposal"), *two, "--prompt", "x", *words]) == 2
    assert message in capsys.readouterr().err


def test_blending_needs_an_aligner_and_bench_has_nothing_to_blend(root, capsys):
    assert main(["generate", "--proposal", str(root / "proposal"), "--prompt", "x", "--blend", "weights"]) == 2
    assert "--blend needs an --aligner" in capsys.readouterr().err
    assert main(["bench", "--proposal", str(root / "proposal"), "--aligner", str(root / "med"), "--blend", "weights"]) == 2
    assert "--blend is for several aligners" in capsys.readouterr().err
