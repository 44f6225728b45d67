"""The study of gates: its columns are what the engine decodes, its curves those of a table made by hand, its run is whole."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from real_study import study_module
from tiny import bpe_tokenizer, save_tiny, tiny_model
from trimtab import AlignedModel, SamplingParams
from trimtab.core.rules import Gate, Product
from trimtab.errors import InvalidOption
from trimtab.models.table import TableLM

chats, curves, demo, gates = (study_module(name) for name in ("chats", "gate_curves", "demo", "gates"))
learned, report, rows = (study_module(name) for name in ("gate_learned", "gate_report", "gate_rows"))

EOS = 5


class Encoder:
    """Ids stand for themselves: what `encode_pairs` would make of messages."""

    def __init__(self, model: AlignedModel) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_pairs(self, prompts: list[Any], completions: list[Any]) -> list[tuple[list[int], list[int], None]]:
        return [(prompt, answer, None) for prompt, answer in zip(prompts, completions, strict=True)]


def models() -> Iterator[AlignedModel]:
    proposal = TableLM.random(6, 2, seed=0, scale=1.5)
    for seed in (1, 2):
        aligner = TableLM.random(6, 1, seed=seed, scale=1.5)
        yield AlignedModel(proposal, [aligner], eos_token_ids=[EOS], rule="product", weight=0.7, draft="none", max_num_seqs=3)


def records() -> list[dict[str, Any]]:
    """Seven answers to five prompts, of different lengths."""
    answers = [[1, 2, EOS], [3, EOS], [0, 0, 4, 2, EOS], [EOS], [2, 2, 2, EOS], [1, EOS], [4, 3, 1, EOS]]
    return [{"prompt": [i % 5, 3], "completion": [answer]} for i, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def table() -> dict[str, torch.Tensor]:
    model, other = models()
    columns = rows.read_columns(Encoder(model), other, records())
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}


def test_columns_are_those_of_the_tokens(table: dict[str, torch.Tensor]):
    model, other = models()
    pairs = [(record["prompt"], record["completion"][0]) for record in records()]
    scores, others = (one.score(*map(list, zip(*pairs, strict=True))) for one in (model, other))
    for name, expected in (
        ("proposal", [v for s in scores for v in s.proposal]),
        ("rule", [v for s in scores for v in s.aligned]),
        ("other", [v for s in others for v in s.aligned]),
        ("position", [j for _, answer in pairs for j in range(len(answer))]),
        ("prompt", [i % 5 for i, (_, answer) in enumerate(pairs) for _ in answer]),
    ):
        assert table[name].tolist() == pytest.approx(expected, abs=1e-12), name
    row = model.proposal.table[2, 3].log_softmax(-1)  # before the first token of the third answer
    at = 5
    assert table["entropy"][at].item() == pytest.approx(-(row.exp() * row).sum().item())
    assert table["best"][at].item() == pytest.approx(row.max().item())
    assert table["margin"][at].item() == pytest.approx((row.sort().values[-1] - row.sort().values[-2]).item())
    assert table["end"][at].item() == pytest.approx(row[EOS].item())


@pytest.mark.parametrize("name", ["entropy", "max_p", "kl past tau", "kl up to tau"])
def test_a_gate_of_the_study_is_the_gate_of_the_engine(table: dict[str, torch.Tensor], name: str):
    """Its likelihood, at a threshold for half of the tokens, is what `score` gives under the rule of that name."""
    model, _ = models()
    way = next(one for one in curves.signals(learned.fit(table)) if one.name == name)
    tau = way.threshold(table, 0.45)
    by, invert = gates.BY[name]
    params = SamplingParams(rule=Gate(Product(), by=by, tau=tau, invert=invert), weight=0.7)
    pairs = [(record["prompt"], record["completion"][0]) for record in records()]
    scores = model.score(*map(list, zip(*pairs, strict=True)), params)
    expected = -math.fsum(v for s in scores for v in s.aligned) / len(table["rule"])
    found = curves.at_threshold(way, table, tau)
    assert found["nll"]["mean"] == pytest.approx(expected, abs=1e-9)
    assert found["share"]["mean"] == pytest.approx(0.45, abs=0.1)  # rows repeat themselves
    assert found["nll"]["mean"] not in (
        pytest.approx(-table["rule"].mean().item()),
        pytest.approx(-table["proposal"].mean().item()),
    )


def test_the_learned_gate_decodes_as_it_was_judged(table: dict[str, torch.Tensor]):
    model, _ = models()
    logit = learned.fit(table)
    way = next(one for one in curves.signals(logit) if one.name == "learned")
    tau = way.threshold(table, 0.5)
    params = SamplingParams(rule=learned.LearnedGate(Product(), logit, (EOS,), tau), weight=0.7)
    pairs = [(record["prompt"], record["completion"][0]) for record in records()]
    scores = model.score(*map(list, zip(*pairs, strict=True)), params)
    expected = -math.fsum(v for s in scores for v in s.aligned) / len(table["rule"])
    assert curves.at_threshold(way, table, tau)["nll"]["mean"] == pytest.approx(expected, abs=1e-9)
    said = model.generate([[1, 3]], SamplingParams(rule=params.rule, weight=0.7, max_tokens=12, seed=1, ignore_eos=True))[0]
    open_everywhere = learned.LearnedGate(Product(), logit, (EOS,))
    plain, opened = (
        model.generate([[1, 3]], SamplingParams(rule=rule, weight=0.7, max_tokens=12, seed=1))[0]
        for rule in (Product(), open_everywhere)
    )
    assert opened.tokens == plain.tokens
    assert (opened.fallbacks, plain.fallbacks) == (0, None)
    assert 0 < said.fallbacks < len(said.tokens), "open at some places and shut at others"


def by_hand() -> dict[str, torch.Tensor]:
    """Four prompts of five tokens, whose first token has nearly all of the gain: .3 of the nats of any other are against it."""
    count = 20
    position = torch.arange(5.0).repeat(4)
    gain = torch.where(position == 0, 6.0, torch.where(position % 2 == 1, 0.5, -0.25))
    made = {"prompt": torch.arange(4.0).repeat_interleave(5), "position": position, "proposal": torch.full((count,), -3.0)}
    made |= {"rule": made["proposal"] + gain, "other": made["proposal"] + gain.roll(1)}
    made |= {"entropy": torch.arange(float(count)), "best": -position - 1, "margin": position * 0 + 1, "end": -position}
    return {name: column.double() for name, column in made.items()} | {"kl": gain.double()}


def test_curves_by_hand():
    """Opening the first tokens, a fifth of all, keeps 6 / (6 + 2 · .5 − 2 · .25) of the gain."""
    made = by_hand()
    ways = {way.name: way for way in curves.signals(learned.fit(made))}
    first = ways["first tokens"]
    found = curves.at_threshold(first, made, first.threshold(made, 0.1))
    assert found["share"] == {"mean": pytest.approx(0.2), "interval": [pytest.approx(0.2)] * 2}
    assert found["kept"]["mean"] == pytest.approx(6 / 6.5)
    assert found["nll"]["mean"] == pytest.approx(3 - 6 / 5)
    assert first.share_for(made, 0.9) == pytest.approx(0.2)
    assert ways["oracle"].share_for(made, 0.97) == pytest.approx(7 / 20)  # three of the eight halves: 25.5 of 26 nats
    assert curves.half(ways["oracle"], made, made)["half"]["kept"]["mean"] == pytest.approx(7 / 6.5)
    assert curves.places(made)["first token"]["of_gain"]["mean"] == pytest.approx(6 / 6.5)
    assert curves.places(made)["end of sequence"]["share"] == pytest.approx(0.2)


def test_oracles_by_hand():
    made = by_hand()
    found = curves.oracles(made)
    assert found["oracle"]["best"]["mean"] == pytest.approx(2 * 0.25 / 5)
    assert found["oracle"]["best_share"] == pytest.approx(3 / 5)
    against = (made["other"] - made["rule"]).clamp(min=0).mean().item()
    assert found["null oracle"]["best"]["mean"] == pytest.approx(against) != pytest.approx(0.1)


def test_the_learned_gate_learns_where_the_gain_is():
    """On tokens whose gain is in the first token and in the row's entropy, it opens there first."""
    made = by_hand()
    logit = learned.fit(made)
    likely = logit([made[name] for name in rows.ROW], made["position"])
    assert likely[made["position"] == 0].min() > likely[made["position"] > 0].max()
    worse = {**made, "rule": made["proposal"] - (made["rule"] - made["proposal"])}
    assert torch.corrcoef(torch.stack([learned.fit(worse)([made[n] for n in rows.ROW], made["position"]), likely]))[0, 1] < 0


def test_a_missing_demo_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "p.gguf").touch()
    words = ["gates.py", "--out", str(tmp_path / "out"), "--demo", str(tmp_path), "--proposal", str(tmp_path / "p.gguf")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(InvalidOption, match="`make demo-real` makes it"):
        gates.main()
    monkeypatch.setattr(sys, "argv", [*words, "--aligner", str(tmp_path)])
    with pytest.raises(InvalidOption, match="--other must name"):
        gates.main()
    assert not (tmp_path / "out").exists()


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SCALE = demo.Scale(
    head_layers=None,
    keep_samples=0,
    test=3, max_tokens=4,
    training=demo.Scale().training | {"max_steps": 4, "learning_rate": 1e-2, "disable_tqdm": True},
)  # fmt: skip


@pytest.mark.slow
def test_the_whole_study_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = bpe_tokenizer(["def f(a): Return", "0123456789 <user>"], chat_template=TEMPLATE)
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "num_hidden_layers": 2}
    proposal = save_tiny(tmp_path / "proposal", tiny_model(**shape), tokenizer)
    data = tmp_path / "data"
    data.mkdir()
    for part, first, last in (("train", 0, 12), ("dev", 12, 16), ("test", 16, 21)):
        names = [f"def f{i}(a):" for i in range(first, last)]
        made = [{"prompt": chats.question(n), "completion": chats.answer(f"Return {n[4:6]}."), "group": n} for n in names]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    demo.train_head(proposal, data, tmp_path / "head", SCALE)
    setting = gates.Setting(proposal, tmp_path / "head", data, scale=SCALE)
    found = gates.run_study(tmp_path / "out", setting)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(found))
    model = AlignedModel.from_pretrained(proposal, tmp_path / "head")
    test = chats.read_part(data, "test")
    scores = model.score([record["prompt"] for record in test], [record["completion"][0] for record in test])
    aligned = -math.fsum(v for s in scores for v in s.aligned) / sum(len(s.tokens) for s in scores)
    assert found["nll"]["rule"]["mean"] == pytest.approx(aligned, abs=1e-5)
    assert found["nll"]["other"]["mean"] != pytest.approx(aligned, abs=1e-5)
    assert found["texts"]["rule"]["share"]["mean"] == 1
    assert found["texts"]["proposal"]["calls"]["mean"] == 0
    assert 0 < found["texts"]["kl past tau at 0.5"]["share"]["mean"] < 1
    page = report.render(found)
    for words in (f"{found['half']['entropy']['half']['kept']['mean']:.3f}", "null oracle", "at best, 50% of the calls"):
        assert words in page
    monkeypatch.setattr(gates, "read_columns", None)  # what is finished is kept
    monkeypatch.setattr(gates, "train_head", None)
    assert gates.run_study(tmp_path / "out", setting)["curves"] == found["curves"]
    with pytest.raises(InvalidOption, match="was begun with"):
        gates.run_study(tmp_path / "out", setting._replace(aligner=tmp_path))
