"""The script for a GPU, whole, on a CPU with tiny shapes; and that its checks can fail."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from trimtab.models.lean import LeanDecoder

pytestmark = pytest.mark.slow

SPEC = importlib.util.spec_from_file_location("gpu_check", Path(__file__).parents[2] / "benchmarks" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_check)
CPU = torch.device("cpu")


def test_all_of_it_runs_on_a_cpu_and_writes_a_report(tmp_path, capsys):
    assert gpu_check.check(tmp_path / "report.json", "cpu", 1000.0) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: found["passed"] for name, found in report["checks"].items()} == dict.fromkeys(
        ["rows", "graphs", "tokens", "waits", "law"], True
    )
    assert [(run["batch"], run["cuda_graphs"]) for run in report["speed"]] == [
        (batch, captured) for captured in (True, False) for batch in (1, 8, 32)
    ]
    assert report["left_out"] == []
    assert report["checks"]["graphs"]["passes"] > 8
    assert "× generate" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_said(tmp_path):
    assert gpu_check.check(tmp_path / "report.json", "cpu", 0.0) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["speed"] == []
    assert len(report["left_out"]) == 6


def test_wrong_rows_are_found(monkeypatch):
    logits = LeanDecoder.logits
    monkeypatch.setattr(LeanDecoder, "logits", lambda self, hidden: logits(self, hidden) * 1.3)
    assert not gpu_check.check_rows(CPU)["passed"]


def test_a_wrong_law_is_found(monkeypatch):
    score = gpu_check.AlignedModel.score
    monkeypatch.setattr(
        gpu_check.AlignedModel, "score", lambda self, prompts, texts: score(self.with_aligners([]), prompts, texts)
    )
    assert not gpu_check.check_law(CPU)["passed"]


def test_other_tokens_are_found(monkeypatch):
    logits = LeanDecoder.logits
    monkeypatch.setattr(LeanDecoder, "logits", lambda self, hidden: logits(self, hidden) * 1.3)
    found = gpu_check.check_tokens(CPU)
    assert not found["passed"]
    assert found["same"] < found["of"]


@pytest.mark.parametrize("fault", ["stale", "never"])
def test_wrong_graphs_are_found(monkeypatch, fault):
    def capture(work):
        if fault == "never":
            raise RuntimeError("out of memory")
        return lambda: None, work()

    monkeypatch.setattr(gpu_check, "capture_on", lambda device: capture)
    assert not gpu_check.check_graphs(CPU)["passed"]
