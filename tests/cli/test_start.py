"""`trimtab start` as a user calls it, and its dry run."""

import json

import pytest

from eval_task import called
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, task_rows, write_rows
from trimtab.cli import main
from trimtab.models.loading import load_model

SHORT = "--max_steps", 2, "--per_device_train_batch_size", 4, "--disable_tqdm", "--use_cpu"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    save_tiny(
        folder / "proposal",
        tiny_model("llama", V, seed=1, num_hidden_layers=5),
        tiny_tokenizer(chat_template=f"s {CHAT_TEMPLATE}"),
    )
    write_rows(folder / "answered.jsonl", task_rows(12))
    return folder


def words_of(task, out, *more):
    return "start", "--proposal", task / "proposal", "--out", out, "--samples", 12, "--max_tokens", 4, *more


def test_it_makes_a_start_that_the_other_commands_take(task, capsys, tmp_path):
    status, out, _ = called(capsys, *words_of(task, tmp_path / "a", "--layers", 2, *SHORT, "--json"))
    report = json.loads(out)
    assert status == 0
    assert (report["out"], report["layers"], report["of_layers"]) == (str(tmp_path / "a"), [0, 4], 5)
    assert report["metrics"]["eval_kl_proposal_start"] < report["before"]["eval_kl_proposal_start"]
    pair = "--proposal", task / "proposal", "--aligner", tmp_path / "a"
    assert called(capsys, "score", *pair, "--dataset", task / "answered.jsonl")[0] == 0
    status, out, _ = called(capsys, *words_of(task, tmp_path / "a", "--layers", 2, *SHORT))  # it is made already
    assert status == 0
    assert out.startswith(f"start in {tmp_path / 'a'}: layers 0, 4 of 5, {report['parameters']:,} parameters")


def test_a_dry_run_says_what_will_be_made_and_makes_nothing(task, capsys, tmp_path):
    status, out, _ = called(capsys, *words_of(task, tmp_path / "a", "--layers", "0,3", "--dry_run", "--json"))
    report = json.loads(out)
    assert status == 0
    assert (report["layers"], report["answers"], report["most_tokens"], report["data"]) == ([0, 3], 12, 48, None)
    assert report["proposal"]["parameters"] == sum(p.numel() for p in load_model(task / "proposal").parameters())
    assert not (tmp_path / "a").exists()
    called(capsys, *words_of(task, tmp_path / "a", "--layers", "0,3", *SHORT))
    assert report["start"]["parameters"] == sum(p.numel() for p in load_model(tmp_path / "a").parameters())
    assert (
        called(capsys, *words_of(task, tmp_path / "b", "--dry_run", "--expected_examples", 7))[0] == 2
    )  # there is no data set
    given = ("--dataset", task / "answered.jsonl", "--answers", "given")
    words = "start", "--proposal", task / "proposal", "--out", tmp_path / "b", *given, "--dry_run"
    assert json.loads(called(capsys, *words, "--json")[1])["answers"] == 12
    assert "answers   12" in called(capsys, *words)[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layers", "0,5"), "layers: there is no layer 5"),
        (("--answers", "given"), "--dataset"),
        (("--columns", "prompt=post"), "--columns needs --dataset"),
        (("--dataset", "answered.jsonl", "--answers", "given"), "--samples is for --answers samples"),
        (("--dataset_split", "test"), "--dataset_split is for a data set of the hub"),
    ],
)
@pytest.mark.parametrize("dry", [("--dry_run",), ()])
def test_what_cannot_be_is_wrong_usage(task, capsys, tmp_path, more, message, dry, monkeypatch):
    monkeypatch.chdir(task)
    status, _, errors = called(capsys, *words_of(task, tmp_path / "a", *more, *SHORT, *dry))
    assert status == 2
    assert message in errors[-1]
    assert not (tmp_path / "a" / "run.json").exists()


def test_help_says_what_a_distillation_does_by_default(capsys):
    with pytest.raises(SystemExit):
        main(["start", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--learning_rate FLOAT [default: 0.001]" in words
    assert "--lr_scheduler_type STR [default: cosine]" in words
    assert "--save_total_limit INT [default: 2]" in words
