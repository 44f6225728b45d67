"""`trimtab fit-weights`, from pairs in a file to weights: the features by brute force, and what is refused."""

import json

import pytest
import torch

import trimtab
from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import write_rows
from trimtab.cli import main
from trimtab.cli.fit_weights import render
from trimtab.core.user_weights import fit_user_weights
from trimtab.errors import DataError, InvalidOption
from trimtab.models.loading import load_model

PAIRS = [("de", "xy", "abc"), ("fgh", "zx", "a"), ("d", "yyx", "cb"), ("ef", "x", "ba")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    for seed, name in enumerate(("proposal", "one", "two")):
        save_tiny(folder / name, tiny_model("llama", 28, seed=seed, spread=0.4), tiny_tokenizer())
    write_rows(folder / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])
    return folder


def told(folder, **settings):
    said = {"proposal": str(folder / "proposal"), "preferences": str(folder / "pairs.jsonl")}
    return said | {"aligner": [f"one={folder}/one", f"two={folder}/two"]} | settings


def logp(folder, name, prompt, answer):
    """Of an answer with its end, by the transformers model alone."""
    model, tokenizer = load_model(folder / name), tiny_tokenizer()
    before, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    behind = [*behind, tokenizer.eos_token_id]
    with torch.no_grad():
        rows = model(torch.tensor([[*before, *behind]])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(behind).unsqueeze(1)).sum())


@pytest.mark.parametrize("rule", ["product", "geometric"])
def test_the_weights_are_those_of_the_answers_log_probabilities(folder, rule):
    report = trimtab.fit_weights(**told(folder, rule=rule, weight=[0.2, 0.0], beta=0.3, prior_scale=0.9))
    of = {name: [[logp(folder, name, p, a) for a in (c, r)] for p, c, r in PAIRS] for name in ("proposal", "one", "two")}
    nats = {name: torch.tensor(pairs, dtype=torch.float64).diff().squeeze(1).neg() for name, pairs in of.items()}
    features = torch.stack([nats["one"], nats["two"]], -1)
    if rule == "geometric":
        features = features - nats["proposal"].unsqueeze(-1)
    wanted = fit_user_weights(features, torch.tensor([0.2, 0.0]), beta=0.3, scale=0.9)
    assert list(report["weights"].values()) == pytest.approx(wanted.mean.tolist(), abs=1e-4)
    for i, name in enumerate(("one", "two")):
        low, high = report["interval"][name]
        assert (high - low) / 2 == pytest.approx(1.96 * float(wanted.deviation[i]), rel=1e-3)
        assert (high + low) / 2 == pytest.approx(report["weights"][name])
    assert report["rule"] == rule
    assert (report["pairs"], report["left_out"]) == (4, 0)
    assert report["prior"] == {"one": 0.2, "two": 0.0}
    ranked = (features @ wanted.mean > 0).double().mean()
    assert report["agree"]["fitted"] == pytest.approx(float(ranked))
    others = [
        fit_user_weights(features[[j for j in range(4) if j != i]], torch.tensor([0.2, 0.0]), beta=0.3, scale=0.9)
        for i in range(4)
    ]
    assert report["agree"]["left_out"] == sum(float(one.mean @ features[i]) > 0 for i, one in enumerate(others)) / 4


def test_the_command_says_how_to_decode(folder, tmp_path, capsys):
    words = ["fit-weights", "--proposal", folder / "proposal", "--preferences", folder / "pairs.jsonl"]
    words += ["--aligner", f"one={folder}/one", "--aligner", f"two={folder}/two"]
    assert main([str(word) for word in [*words, "--json", "--out", tmp_path / "user.json"]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["weights"]) == set(report["interval"]) == {"one", "two"}
    assert json.loads((tmp_path / "user.json").read_text()) == report
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("decode with: "))
    flags = line.removeprefix("decode with: ").split()
    assert main(["generate", "--proposal", str(folder / "proposal"), *flags, "--prompt", "de", "--max_tokens", "3"]) == 0


def test_it_says_where_an_aligner_tells_lengths_and_nothing_else(folder, tmp_path, caplog):
    """One with uniform rows favours what is shorter, under `product`."""
    save_tiny(tmp_path / "flat", tiny_model("llama", 28, seed=9, spread=0.0), tiny_tokenizer())
    model = load_model(tmp_path / "flat")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    model.save_pretrained(tmp_path / "flat")
    rows = [{"prompt": "de", "chosen": "x" * (i + 1), "rejected": "y" * (2 * i + 3)} for i in range(6)]
    write_rows(tmp_path / "short.jsonl", rows)
    both = [f"flat={tmp_path}/flat", f"one={folder}/one"]
    with caplog.at_level("WARNING"):
        report = trimtab.fit_weights(**told(folder, aligner=both, preferences=str(tmp_path / "short.jsonl")))
    assert report["length"]["flat"] == pytest.approx(1.0)
    assert report["weights"]["flat"] > 0.5
    assert "what 'flat' says of these answers is how long they are, to 100 %" in caplog.text


def test_many_pairs_are_not_left_out_one_by_one(folder, tmp_path):
    rows = [{"prompt": "de", "chosen": "x", "rejected": "y"}] * 201
    write_rows(tmp_path / "many.jsonl", rows)
    report = trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "many.jsonl")))
    assert report["agree"]["left_out"] is None
    assert "leave out the pair" not in render(report)


def test_an_answer_that_was_cut_has_no_end(folder, tmp_path):
    row = {"prompt": "de", "chosen": "xy", "rejected": "xyz", "unfinished": ["chosen"]}
    write_rows(tmp_path / "cut.jsonl", [row])
    cut = trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "cut.jsonl")))
    write_rows(tmp_path / "cut.jsonl", [{**row, "unfinished": []}])
    whole = trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "cut.jsonl")))
    assert cut["weights"] != whole["weights"]


def test_equal_answers_say_nothing(folder, tmp_path, caplog):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "more.jsonl", [*rows, {"prompt": "de", "chosen": "x", "rejected": "x"}])
    with caplog.at_level("WARNING"):
        more = trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "more.jsonl")))
    assert "1 of 5 pairs have two equal answers: left out" in caplog.text
    assert more["weights"] == trimtab.fit_weights(**told(folder))["weights"]
    assert more["left_out"] == 1
    write_rows(tmp_path / "more.jsonl", [{"prompt": "de", "chosen": "x", "rejected": "x"}])
    with pytest.raises(DataError, match="no pair is left"):
        trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "more.jsonl")))


def test_long_pairs_are_named_or_left_out(folder, tmp_path):
    rows = [{"prompt": "de", "chosen": "x", "rejected": "y"}, {"prompt": "d" * 70, "chosen": "x", "rejected": "y"}]
    write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(DataError, match=r"long\.jsonl:2: prompt and answer have 72 tokens, and the context 64"):
        trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "long.jsonl")))
    report = trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "long.jsonl"), leave_out_long=True))
    assert (report["pairs"], report["left_out"]) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"aligner": ["one=A", "one=B"]}, "aligner: two are called 'one'"),
        ({"aligner": ["=A"]}, "aligner must be NAME=PATH"),
        ({"aligner": []}, "aligner is required"),
        ({"preferences": ""}, "preferences is required"),
        ({"weight": [1.0]}, "1 weight for 2 aligner"),
        ({"beta": 0.0}, "beta must be from 1e-06 to 1000"),
        ({"prior_scale": -1.0}, "prior_scale must be from 1e-06 to 1000"),
        ({"rule": "mixture"}, "rule must be one of product, geometric"),
        ({"dataset_split": "test"}, "dataset_split is for a data set of the hub"),
    ],
)
def test_what_cannot_be_is_refused(folder, settings, said):
    with pytest.raises(InvalidOption, match=said):
        trimtab.fit_weights(**told(folder, **settings))


def test_pairs_are_needed(folder, tmp_path):
    write_rows(tmp_path / "wanted.jsonl", [{"prompt": "de", "completion": "x"}])
    with pytest.raises(DataError, match=r"wanted\.jsonl:1"):
        trimtab.fit_weights(**told(folder, preferences=str(tmp_path / "wanted.jsonl")))
    with pytest.raises(InvalidOption, match="would replace the data that it is made from"):
        trimtab.fit_weights(**told(folder, out=str(folder / "pairs.jsonl")))
    assert len((folder / "pairs.jsonl").read_text().splitlines()) == 4
