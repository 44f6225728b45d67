"""The demo at a size that takes seconds: what it leaves behind, and that its figures are what the commands say."""

import json
import re
from html.parser import HTMLParser

import pytest

from trimtab.cli import main
from trimtab.demo.corpus import read_corpus
from trimtab.demo.pretrain import Size
from trimtab.demo.run import Scale, run_demo

pytestmark = pytest.mark.slow

SIZE = Size(hidden=32, layers=1, steps=30, learning_rate=5e-3)
SCALE = Scale(proposal=SIZE, small=SIZE, vocab_size=512, epochs=2, records=60, shown=2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    run_demo(out, 0, SCALE)
    return out


def test_results_are_those_of_score_on_the_same_folders(demo, capsys):
    results = json.loads((demo / "results.json").read_text())
    assert {"nll", "nll_interval", "speed", "seconds", "hardware"} <= results.keys()
    folders = ["--proposal", str(demo / "proposal"), "--aligner", str(demo / "aligner")]
    capsys.readouterr()
    assert main(["score", *folders, "--dataset", str(demo / "data" / "held_out.jsonl"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("proposal", "aligner", "aligned"):
        assert report["nll"][name] == pytest.approx(results["nll"][name], abs=1e-5)
    low, high = results["nll_interval"]["aligned"]
    assert low < results["nll"]["aligned"] < high


def test_an_interrupted_demo_leaves_the_earlier_one_whole(demo, monkeypatch):
    def contents():
        return {path: path.read_bytes() for path in demo.parent.rglob("*") if path.is_file()}

    before = contents()
    assert json.loads((demo / "aligner" / "trimtab.json").read_text())["proposal"]["id"] == str(demo / "proposal")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.demo.run.write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(demo, 1, SCALE)
    assert contents() == before


def test_a_file_in_the_place_of_the_folder_is_said_at_once(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="a file is where a folder should be"):
        run_demo(tmp_path / "out", 0, SCALE)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_report_needs_no_network_and_closes_its_tags(demo):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert page.count("<svg") == page.count("</svg>") == 3

    class Balance(HTMLParser):
        depth = 0

        def handle_starttag(self, tag, attrs):
            self.depth += tag not in ("meta", "line")

        def handle_endtag(self, tag):
            self.depth -= 1

    parser = Balance()
    parser.feed(re.sub(r"<(line|polyline)[^>]*/>", "", page.replace("<!doctype html>", "")))
    assert parser.depth == 0


def test_nothing_held_out_stands_on_another_side(tmp_path):
    """Sides are dealt by module; a signature that many modules share stays on the training side."""
    for i in range(60):
        body = 'def shared(a):\n    """The same signature everywhere."""\n\n'
        body += f'def own{i}(b):\n    """Text of module number {i}."""\n'
        (tmp_path / f"module{i}.py").write_text(body)
    corpus = read_corpus(tmp_path)
    align, held_out = ({record["prompt"] for record in side} for side in (corpus.align, corpus.held_out))
    assert align
    assert held_out
    assert not align & held_out
    source = "\n".join(corpus.pretrain)
    assert not any(prompt.split("(")[0] + "(" in source for prompt in held_out)
