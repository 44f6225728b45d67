"""docs/blending.md: its commands and its Python run as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from tiny import bpe_tokenizer, save_lora, save_tiny, tiny_model
from trimtab.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "blending.md").read_text(encoding="utf-8")


def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    tokenizer = bpe_tokenizer(["Take two of these and call me."])
    for seed, name in enumerate(("P", "base", "A0", "A1", "A2")):
        save_tiny(tmp_path / name, tiny_model("llama", len(tokenizer), seed=seed, spread=0.3), tokenizer)
    for seed, name in enumerate(("lora_med", "lora_law")):
        save_lora(tmp_path / name, tmp_path / "base", seed=seed, r=2 + seed, target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    (commands, serving), (source,) = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("bash", "python"))
    assert serving.startswith("trimtab serve --proposal P --aligner")  # runs until it is stopped: tests/serve/test_dial.py
    for line in commands.splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0
    assert (tmp_path / "A" / "model.safetensors").is_file()
    assert (tmp_path / "L" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    exec(compile(source, "docs/blending.md", "exec"), {})
    assert capsys.readouterr().out.strip()
