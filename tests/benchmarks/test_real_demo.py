"""The demo on a real model, on a tiny one: what it leaves behind, what its figures are, and that it goes on after a kill."""

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest

from real_study import study_module
from tiny import bpe_tokenizer, save_tiny, tiny_model
from trimtab import AlignedModel
from trimtab.errors import InvalidOption

pytestmark = pytest.mark.slow

chats, demo, demo_report = (study_module(name) for name in ("chats", "demo", "demo_report"))

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SCALE = demo.Scale(
    head_layers=None,
    keep_samples=4,
    train=12, test=3, max_tokens=4, shown=2, speed=1,
    training=demo.Scale().training | {"max_steps": 8, "learning_rate": 1e-2, "disable_tqdm": True},
)  # fmt: skip


def make_task() -> Any:
    def records(count: int, first: int) -> list[dict[str, Any]]:
        names = [f"def f{i}(a):" for i in range(first, first + count)]
        return [{"prompt": chats.question(n), "completion": chats.answer("Return <a>."), "group": n} for n in names]

    return chats.Task("tiny", lambda _: {"train": records(20, 0), "dev": records(4, 20), "test": records(5, 24)}, "", 64)


@pytest.fixture(scope="module")
def proposal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = bpe_tokenizer(["def f(a): Return", "0123456789 <user>"], chat_template=TEMPLATE)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048, num_hidden_layers=2)
    return save_tiny(tmp_path_factory.mktemp("proposal"), model, tokenizer)


@pytest.fixture(scope="module")
def done(proposal: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo.run_demo(out, proposal, SCALE, make_task())


def test_the_figures_are_those_of_the_head_that_is_left(done: tuple[Path, dict[str, Any]], proposal: Path):
    out, report = done
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    model = AlignedModel.from_pretrained(proposal, report["head"]["folder"])
    test = chats.read_part(out / "tiny" / "data", "test")[:3]
    scores = model.score([record["prompt"] for record in test], [record["completion"][0] for record in test])
    tokens = sum(len(score.tokens) for score in scores)
    aligned, bare = (-math.fsum(v for s in scores for v in getattr(s, name)) / tokens for name in ("aligned", "proposal"))
    found = {name: figures["nll"]["mean"] for name, figures in report["systems"].items()}
    assert found["aligned"] == pytest.approx(aligned, abs=1e-5)
    assert found["proposal"] == pytest.approx(bare, abs=1e-5)
    assert report["gains"]["proposal"]["nll"]["mean"] == pytest.approx(aligned - bare, abs=1e-5)
    assert aligned < bare
    assert found["six examples"] not in (pytest.approx(bare), pytest.approx(aligned))
    assert (report["head"]["learnt_from"], report["head"]["layers"], report["prompts"]) == (12, 2, 3)
    assert [item["asked"] for item in report["shown"]] == [record["group"] for record in test[:2]]


def test_the_page_shows_everybody_and_escapes_them(done: tuple[Path, dict[str, Any]]):
    out, report = done
    page = (out / "report.html").read_bytes().decode()
    assert "Return &lt;a&gt;." in page
    assert "Return <a>." not in page
    gains = [f"{gain['nll']['mean']:+.2f}".replace("-", "−") for gain in report["gains"].values()]
    for words in (*gains, report["hardware"], "with six examples", escape(report["shown"][0]["answers"]["proposal"])):
        assert words in page
    assert page.count("<div") == page.count("</div>")


def test_it_goes_on_after_a_kill(proposal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "measure_speed", killed)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path, proposal, SCALE, make_task())
    assert not (tmp_path / "report.json").exists()
    monkeypatch.setattr(demo, "train", killed)
    monkeypatch.setattr(demo, "measure_part", killed)
    report = demo.run_demo(tmp_path, proposal, SCALE, make_task())
    assert set(report["seconds"]) >= {"train the head", "judge aligned", "measure the speed"}
    with pytest.raises(InvalidOption, match="was begun with"):
        demo.run_demo(tmp_path, proposal, SCALE._replace(test=2), make_task())


def test_a_verdict_needs_an_interval_without_zero():
    def gains(*intervals: tuple[float, float]) -> dict[str, Any]:
        return {name: {"interval": interval} for name, interval in zip(("nll", "rougeL", "chrf"), intervals, strict=True)}

    assert demo_report.verdict(gains((-2, -1), (1, 2), (-1, 1))) == (
        "<b>clearly better</b> in likelihood and ROUGE-L, <b>not clearly different</b> in chrF"
    )
    assert demo_report.verdict(gains((1, 2), (-2, -1), (-2, -1))) == "<b>clearly worse</b> in likelihood, ROUGE-L and chrF"


def test_a_missing_model_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["demo.py", "--out", str(tmp_path / "out"), "--proposal", str(tmp_path / "no.gguf")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(InvalidOption, match="`make real-model` fetches it"):
        demo.main()
    assert not (tmp_path / "out").exists()
