"""The benchmark: its baselines do the work they are named for, and its report is the contract's."""

import json

import pytest
import torch

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.evaluate.speed import (
    Stock,
    _generate,
    _step_bytes,
    _two_model_loop,
    _weight_bytes,
    load_stock,
    measure_speed,
    random_prompts,
)
from trimtab.models.head import HeadPool

CONTRACT = {"proposal_hf", "two_model_hf", "aligned_tokenwise", "aligned_speculative"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("proposal", "aligner")):
        save_tiny(out / name, tiny_model("llama", 28, seed=seed, spread=0.3), tiny_tokenizer())
    return out


def test_the_two_model_loop_is_the_product():
    """Greedy: the same tokens as ours; and it makes as many as it is asked for."""
    stock = Stock(tiny_model("llama", 28, seed=0, spread=0.3), tiny_model("llama", 28, seed=1, spread=0.3))
    prompts = random_prompts(28, 3, 5, seed=0)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    ours = AlignedModel.from_pretrained(stock.proposal, stock.aligner).generate(prompts, params)
    assert _two_model_loop(stock, torch.tensor(prompts), params).tolist() == [c.tokens for c in ours]


def test_every_contestant_makes_every_token(monkeypatch):
    """`generate` may not stop at an end of sequence while the others go on."""
    stock = Stock(tiny_model("llama", 28, seed=0), tiny_model("llama", 28, seed=1))
    seen = []
    generate = stock.proposal.generate
    monkeypatch.setattr(stock.proposal, "generate", lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1])
    _generate(stock.proposal, torch.tensor([[1, 2, 3]]), SamplingParams(max_tokens=40, temperature=1.0))
    assert seen[0].shape == (1, 43)


def test_the_report_is_consistent(folder):
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "aligner", num_speculative_tokens=2)
    stock = Stock(tiny_model("llama", 28, seed=0, spread=0.3), tiny_model("llama", 28, seed=1, spread=0.3))
    report = measure_speed(model, stock, random_prompts(28, 2, 4, seed=1), SamplingParams(max_tokens=8, seed=0), repeats=2)
    assert report["tokens_per_second"].keys() == {*CONTRACT, "proposal_engine"}
    for name, speed in report["tokens_per_second"].items():
        assert report["ratio_to_proposal_hf"][name] == pytest.approx(speed / report["tokens_per_second"]["proposal_hf"])
    assert 1 <= report["tokens_per_proposal_call"] <= 3
    assert 0 < report["draft_length"] <= 2
    assert report["first_token_ms"] > 0


def test_weights_that_a_step_reads_leave_out_a_table_that_is_only_looked_up():
    tied, untied = (tiny_model("llama", 28, tie_word_embeddings=tie) for tie in (True, False))
    assert _weight_bytes(tied) == _weight_bytes(untied) == sum(p.numel() for p in tied.parameters()) * 4


def test_a_step_reads_what_its_models_take(folder):
    """The layers of a head are read once at weight 1, and twice elsewhere; whoever drafts reads its weights for each draft."""
    stock = Stock(load_stock(str(folder / "proposal"), "auto", None), load_stock(str(folder / "aligner"), "auto", None))
    p, q = map(_weight_bytes, (stock.proposal, stock.aligner))
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "aligner")
    assert _step_bytes(model, stock, SamplingParams(), 2.0) == p + 3 * q
    ngrams = AlignedModel.from_pretrained(folder / "proposal", folder / "aligner", draft="ngram")
    assert _step_bytes(ngrams, stock, SamplingParams(), 2.0) == p + q
    drafted = AlignedModel.from_pretrained(folder / "proposal", folder / "aligner", draft=folder / "aligner")
    assert _step_bytes(drafted, stock, SamplingParams(), 2.0) == p + q + 3 * drafted.models.drafter.model.num_bytes
    assert _step_bytes(drafted, stock, SamplingParams(temperature=0), 2.0) == p + q + 2 * drafted.models.drafter.model.num_bytes
    pool = HeadPool(model.proposal, 1)
    head = AlignedModel(model.proposal, [pool], model.tokenizer, rule="geometric", weight=1.0)
    below = sum(w.numel() * w.element_size() for w in stock.proposal.model.layers[0].parameters())
    stock = Stock(stock.proposal, stock.proposal)
    assert _step_bytes(head, stock, SamplingParams(), 0.0) == p
    assert _step_bytes(head, stock, SamplingParams(weight=0.5), 0.0) == 2 * p - below


def test_bench_prints_the_contract(folder, capsys):
    capsys.readouterr()
    words = ["bench", "--proposal", str(folder / "proposal"), "--aligner", str(folder / "aligner"), "--json"]
    assert main([*words, "--max_tokens", "6", "--repeats", "1", "--batch", "1", "--batch", "2", "--context", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"hardware", "dtype", "batch", "acceptance", "tokens_per_proposal_call", "floor_ratio"} <= report.keys()
    assert CONTRACT < report["tokens_per_second"].keys() == report["ratio_to_proposal_hf"].keys()
    assert (report["batch"], report["dtype"]) == (1, "float32")
    assert report["floor_ratio"] > 0
    assert [run["batch"] for run in report["runs"]] == [1, 2]
    assert report["kernels"] == dict.fromkeys(("proposal", "aligner"), "lean pass, 0 of 9 weights packed")  # they are small
    assert "assisted_hf" in report["tokens_per_second"]
    assert main([*words[:-1], "--max_tokens", "4", "--repeats", "1"]) == 0
    assert "× generate" in capsys.readouterr().out


def test_weights_that_are_kept_otherwise_are_said_and_have_no_floor(tmp_path, capsys):
    """The bytes of a float32 module are no bound for what reads a quarter of them."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    for seed, name in enumerate(("proposal", "aligner")):
        save_tiny(tmp_path / name, tiny_model("llama", 28, seed=seed, spread=0.1, **sizes), tiny_tokenizer())
    words = ["bench", "--proposal", str(tmp_path / "proposal"), "--aligner", str(tmp_path / "aligner"), "--quantize", "int8"]
    capsys.readouterr()
    assert main([*words, "--max_tokens", "4", "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    assert "float32 and float32, ours in int8, rule product" in text
    assert "bandwidth floor" not in text


def test_embeddings_may_be_padded_differently(tmp_path, capsys):
    """As in Qwen2.5: more columns in the proposal than in the aligner, and than the tokenizer has tokens."""
    for seed, (name, columns) in enumerate((("proposal", 32), ("aligner", 28))):
        save_tiny(tmp_path / name, tiny_model("llama", columns, seed=seed, spread=0.3), tiny_tokenizer())
    words = ["bench", "--proposal", str(tmp_path / "proposal"), "--aligner", str(tmp_path / "aligner"), "--json"]
    capsys.readouterr()
    assert main([*words, "--max_tokens", "4", "--repeats", "1"]) == 0
    assert "assisted_hf" not in json.loads(capsys.readouterr().out)["tokens_per_second"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--context", "60", "--max_tokens", "10"], "prompts[0] has 69 tokens, but the context holds 64"),
        (["--aligner", "x"], "exactly one --aligner"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(folder, capsys, flags, message):
    words = ["bench", "--proposal", str(folder / "proposal"), "--aligner", str(folder / "aligner"), *flags]
    assert main(words) == 2
    assert message in capsys.readouterr().err
