"""The study of a real model, on a tiny one: what its systems say and score, what a cell holds, and the tables."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from real_study import study_module
from tiny import bpe_tokenizer, save_lora, save_tiny, tiny_model
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main as trimtab
from trimtab.errors import InvalidOption, TrimtabError

chats, cells, lora, measuring = (study_module(name) for name in ("chats", "cell", "lora", "measure"))
report, rivals, study, systems, trained = (study_module(name) for name in ("report", "rivals", "study", "systems", "trained"))

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ("one sentence", "a town", "facts", "the river", "no list", "a festival", "wool", "bells")


def records(count: int, pairs: bool = False) -> list[dict]:
    texts = [f"{WORDS[i % 8]} of {i}" for i in range(count)]
    answers = {"chosen": "yes, {}", "rejected": "no"} if pairs else {"completion": "yes, {}"}
    return [
        {"prompt": chats.question(text), **{k: chats.answer(v.format(text)) for k, v in answers.items()}, "group": text}
        for text in texts
    ]


def make_task(pairs: bool = False) -> SimpleNamespace:
    return chats.Task("tiny", lambda _: {p: records(n, pairs) for p, n in (("train", 12), ("dev", 4), ("test", 3))}, "Say.", 4)


@pytest.fixture(scope="module")
def proposal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = bpe_tokenizer(WORDS, chat_template=TEMPLATE)
    model = tiny_model(vocab_size=len(tokenizer), spread=0.3, max_position_embeddings=2048, num_hidden_layers=3)
    return save_tiny(tmp_path_factory.mktemp("proposal"), model, tokenizer)


def cell_of(out: Path, proposal: Path, system: str, *, pairs: bool = False):
    cell = cells.Cell(out, proposal, make_task(pairs), system, 0)
    cell.task.prepare(cell.data, None)
    return cell._replace(max_examples=2)


def test_examples_stand_before_every_prompt(tmp_path: Path, proposal: Path):
    """Scored by hand: a chat of six examples and the prompt is the same prompt to the bare proposal."""
    cell = cell_of(tmp_path, proposal, rivals.SIX)
    six, bare = rivals.RIVALS[rivals.SIX].open(cell), rivals.open_proposal(cell)
    shown = rivals.examples(cell)
    assert [message["role"] for message in shown] == ["user", "assistant"] * 6
    assert {message["content"] for message in shown[::2]} <= {record["group"] for record in cell.read("train")}
    assert rivals.examples(cell) == shown != rivals.examples(cell._replace(seed=1))
    record = cell.read("test")[0]
    chat, answer = record["prompt"], record["completion"][0]
    by_hand = bare.model.score([[*shown, *chat]], [answer])[0]
    assert six.nll([chat], [answer]) == [(pytest.approx(-sum(by_hand.proposal)), len(by_hand.tokens))]
    assert six.nll([chat], [answer])[0][0] != pytest.approx(bare.nll([chat], [answer])[0][0], abs=1e-3)


def test_examples_of_constraints_are_one_of_each_kind(tmp_path: Path, proposal: Path):
    kinds = study_module("constraints").KINDS
    rows = [record | {"constraint": {"kind": kinds[i % 6]}} for i, record in enumerate(records(24))]
    cell = cells.Cell(tmp_path, proposal, chats.Task("t", lambda _: {"train": rows}, "", 4), "", 0)
    cell.task.prepare(cell.data, None)
    places = [int(message["content"].rpartition(" ")[2]) % 6 for message in rivals.examples(cell)[::2]]
    assert sorted(places) == list(range(6))


def test_best_of_n_is_the_likeliest_to_the_referee(tmp_path: Path, proposal: Path):
    cell = cell_of(tmp_path, proposal, f"best of {systems.OF}")
    best = rivals.RIVALS[cell.system].open(cell)
    chat = cell.read("test")[0]["prompt"]
    params = SamplingParams(max_tokens=4, temperature=0.0, seed=3)
    chosen = list(best.answers([chat], params)[0].tokens)
    drawn = best.model.generate([chat], SamplingParams(max_tokens=4, n=systems.OF, seed=3_000_000))
    means = [total / count for total, count in best.referee.nll([chat] * 8, [list(one.tokens) for one in drawn])]
    assert chosen == list(drawn[means.index(min(means))].tokens)
    found = measuring.measure(cell)
    greedy = SamplingParams(max_tokens=cell.task.max_tokens, temperature=0.0, seed=cell.seed)
    said = [len(one.tokens) for one in best.answers([record["prompt"] for record in cell.read("test")], greedy)]
    assert found["kl"] == {"kl": [pytest.approx(math.log(8) - 7 / 8)] * len(said), "tokens": said, "bound": True}
    with pytest.raises(ValueError, match="samples need a seed"):
        best.answers([chat], dataclasses.replace(params, seed=None))


def test_a_cell_holds_what_its_docstring_says(tmp_path: Path, proposal: Path):
    found = measuring.measure(cell_of(tmp_path, proposal, rivals.PROPOSAL))
    part = found["parts"]["test"]
    assert len(part["answers"]) == len(part["rougeL"]) == len(part["chrf"]) == len(part["nll"]) == 3
    assert found["kl"]["kl"] == [0.0] * 3
    assert found["outside"]["nll"] == found["outside"]["proposal_nll"]
    assert len(found["outside"]["tokens"]) == 2
    assert found["training"] is None
    assert json.loads(json.dumps(found)) == found


def test_of_long_tasks_some_prompts_are_answered_and_all_have_a_likelihood(tmp_path: Path, proposal: Path):
    cell = cell_of(tmp_path, proposal, rivals.PROPOSAL, pairs=True)
    found = measuring.measure(cell._replace(task=cell.task._replace(answered=2)))
    part = found["parts"]["test"]
    assert len(part["answers"]) == len(part["finish_reasons"]) == len(found["kl"]["kl"]) == 2
    assert len(part["prompts"]) == len(part["nll"]) == len(part["rejected"]) == 3


def test_answers_to_one_prompt_are_summed(proposal: Path, tmp_path: Path):
    cell = cell_of(tmp_path, proposal, rivals.PROPOSAL)
    bare, (first, second, _) = rivals.open_proposal(cell), cell.read("test")
    twice = [first, second, first | {"completion": chats.answer("no")}]
    found = measuring.measure_part(cell, bare, twice)
    alone = bare.nll([first["prompt"]] * 2, [first["completion"][0], chats.answer("no")[0]])
    assert len(found["nll"]) == 2
    assert found["nll"][0] == pytest.approx(sum(total for total, _ in alone), rel=1e-5)
    assert found["tokens"][0] == sum(count for _, count in alone)


def test_an_adapter_is_in_the_weights_of_a_ceiling(tmp_path: Path, proposal: Path, monkeypatch: pytest.MonkeyPatch):
    cell = cell_of(tmp_path, proposal, "LoRA-SFT")
    adapter = save_lora(tmp_path / "adapter", proposal)
    monkeypatch.setattr(lora, "tune", lambda *_: adapter)
    tuned, bare = rivals.RIVALS["LoRA-SFT"].open(cell), rivals.open_proposal(cell)
    steered = AlignedModel.from_pretrained(proposal, adapter, rule="geometric", weight=1.0)  # the adapter alone
    record = cell.read("test")[0]
    expected = -sum(steered.score([record["prompt"]], [record["completion"][0]])[0].aligned)
    assert tuned.nll([record["prompt"]], [record["completion"][0]])[0][0] == pytest.approx(expected, rel=1e-4)
    drawn = SamplingParams(max_tokens=4, seed=5)
    sample = list(tuned.answers([record["prompt"]], dataclasses.replace(drawn, temperature=1.0))[0].tokens)
    gap = bare.nll([record["prompt"]], [sample])[0][0] - tuned.nll([record["prompt"]], [sample])[0][0]
    assert tuned.divergence(bare, [record["prompt"]], drawn) == [(pytest.approx(gap), len(sample))]


def test_a_missing_trl_is_said_before_any_work(tmp_path: Path, proposal: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["study.py", "--out", str(tmp_path / "o"), "--proposal", str(proposal)])
    with pytest.raises(InvalidOption, match="pip install trl"):
        study.main()
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_command_lines_are_what_train_takes(tmp_path: Path, proposal: Path, capsys: pytest.CaptureFixture[str]):
    """Every line of the table passes the command's own dry run."""
    for name in trained.TRAINED:
        pairs = trained.learns_pairs(name)
        cell = cell_of(tmp_path / ("pairs" if pairs else "answers"), proposal, name, pairs=pairs)
        words = ["1" if word == "20" else word for word in trained.command(name, cell)]  # layers: this model has fewer
        assert trimtab([*words, "--dry_run", "--json", "--assume_tflops", "1"]) == 0
        assert json.loads(capsys.readouterr().out)["data"]["examples"] == 12
    start = AlignedModel.from_pretrained(trained.start_of(cell), draft="none").proposal.model
    whole = AlignedModel.from_pretrained(proposal, draft="none").proposal.model
    assert start.config.num_hidden_layers == 2
    weights = whole.state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in start.state_dict().items())


def test_a_failed_command_is_an_error(tmp_path: Path, proposal: Path, monkeypatch: pytest.MonkeyPatch):
    cell = cell_of(tmp_path, proposal, trained.DEFAULT)
    monkeypatch.setattr(trained, "command", lambda *_: ["train"])
    monkeypatch.setattr(trained.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    with pytest.raises(TrimtabError, match="trimtab train ended with exit status 2"):
        trained.train(trained.DEFAULT, cell)


def test_cells_are_those_that_make_sense(tmp_path: Path, proposal: Path):
    for pairs in (False, True):
        base = cells.Cell(tmp_path, proposal, make_task(pairs)._replace(name=f"pairs {pairs}"), "", 0)
        base.task.prepare(base.data, None)
        names = [rivals.PROPOSAL, rivals.SIX, "head, preference", "LoRA-DPO"]
        found = [(one.system, one.seed) for one in study.cells(base, [base.task], names, [3, 4])]
        expected = [(rivals.PROPOSAL, 3), (rivals.SIX, 3), (rivals.SIX, 4)]
        assert found == expected + [(name, seed) for name in names[2:] for seed in (3, 4)] * pairs


def test_a_study_goes_on_and_is_not_mixed(tmp_path: Path, proposal: Path, monkeypatch: pytest.MonkeyPatch):
    task = make_task()
    monkeypatch.setattr(study, "TASKS", {"tiny": task})
    calls = []

    def measure(cell):
        calls.append((cell.system, cell.seed))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"parts": {}}

    monkeypatch.setattr(study, "measure", measure)
    words = ["study.py", "--out", str(tmp_path / "out"), "--proposal", str(proposal), "--tasks", "tiny"]
    words += ["--systems", "proposal", "six examples"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        study.main()
    study.main()
    study.main()
    assert calls == [("proposal", 0), ("six examples", 0), ("six examples", 0), ("six examples", 1)]
    monkeypatch.setattr(sys, "argv", [*words, "--max_examples", "6"])
    with pytest.raises(InvalidOption, match="choose another"):
        study.main()
    monkeypatch.setattr(sys, "argv", [*words, "--max_examples", "5"])
    with pytest.raises(InvalidOption, match="max_examples must be at least 6"):
        study.main()


def result(system: str, seed: int, nll: list[float], **more) -> dict:
    part = {"prompts": ["a", "b", "b"], "nll": nll, "tokens": [2, 1, 1], "answers": ["x y z w"] * 3} | more
    part["finish_reasons"] = ["stop", "length", "stop"]
    return {
        "task": "t", "system": system, "seed": seed, "hardware": f"machine {seed}", "parts": {"test": part}, "training": None,
        "kl": {"kl": [1.0, 0.0, 1.0], "tokens": [2, 1, 1], "bound": system == "best"},
        "outside": {"nll": [3.0], "proposal_nll": [2.0], "tokens": [4]},
        "speed": {"tokens_per_second": 8.0, "ratio_to_transformers": 1.5, "ratio_prompts_read_whole": 1.25},
    }  # fmt: skip


def test_differences_are_paired_over_seeds():
    """Mean of the seeds' sums less the proposal's, over its tokens: ((4+6)/2 − 8) + (1 − 2) + (3 − 2) = −3, over 4 tokens."""
    found = report.Results(
        [result("proposal", 0, [8.0, 2.0, 2.0]), result("mine", 0, [4.0, 1.0, 3.0]), result("mine", 1, [6.0, 1.0, 3.0])]
    )
    mine, base = (found.sums(name, "test", "nll", "tokens") for name in ("mine", "proposal"))
    assert report.ratio(report.pooled(mine))[0] == pytest.approx(18 / 8)
    mean, (low, high) = report.ratio(report.minus(mine, base))
    assert mean == pytest.approx(-3 / 4)
    assert (low, high) == (pytest.approx(-3 / 2), pytest.approx(0.0))  # the groups a and b, as wholes
    table = report.render(found, "test")
    assert "| mine | 2.250 [" in table
    assert "| -0.750 [-1.500, +0.000] | – | 2.000 2.500 |" in table
    assert "| mine | 0.500 [" in table  # KL
    assert "| ≤ 0.500 [" in report.render(report.Results([result("best", 0, [1.0] * 3)]), "test")
    assert "| +0.250 [+0.250, +0.250] | – | – | – | 8.00 | 1.50 |" in table
    assert table.splitlines()[-2:] == [
        "- Measured on machine 0: proposal; mine (seed 0).",
        "- Measured on machine 1: mine (seed 1).",
    ]
    old = {name: value for name, value in result("mine", 0, [1.0] * 3).items() if name != "hardware"}
    assert report.render(report.Results([old]), "test").endswith("- Measured on a machine that is not on record: mine.")


def test_reward_accuracy_is_dpos():
    """Rewards of the pairs: 8−4 against 4−3, then −1 against 0, then 0 against 0: right, wrong, a tie."""
    more = {"rejected_tokens": [8, 1, 1]}
    base = result("proposal", 0, [8.0, 2.0, 2.0], rejected=[4.0, 1.0, 1.0], **more)
    mine = result("mine", 0, [4.0, 3.0, 2.0], rejected=[3.0, 1.0, 1.0], **more)
    table = report._rewards(report.Results([base, mine]), ["proposal", "mine"])
    assert table.splitlines()[2].startswith("| mine | 0.500 [")
    assert report._won(mine["parts"]["test"], base["parts"]["test"], mean=False) == {
        ("a", 0): (1.0, 1.0), ("b", 1): (0.0, 1.0), ("b", 2): (0.5, 1.0),
    }  # fmt: skip
    steep = result("mine", 0, [4.0, 3.0, 2.0], rejected=[-9.0, 1.0, 1.0], **more)["parts"]["test"]
    assert [report._won(steep, base["parts"]["test"], mean)["a", 0][0] for mean in (False, True)] == [0.0, 1.0]
