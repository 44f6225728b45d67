"""The command line: one JSON object on standard output, one line for each error, and the right exit status."""

import json

import pytest
import torch

from eval_task import called
from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import make_task
from trimtab.cli import COMMANDS


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = make_task(tmp_path_factory.mktemp("task"))
    broken = tiny_model("llama", 28, seed=3)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    save_tiny(folder / "nan", broken, tiny_tokenizer())
    save_tiny(folder / "other", tiny_model("llama", 6, seed=3), tiny_tokenizer("abcde"))
    save_tiny(folder / "torn", tiny_model("llama", 28, seed=3), tiny_tokenizer())
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n')
    (folder / "config.yaml").write_text("max_tokens: 3\nseed: 5\n")
    (folder / "list.yaml").write_text("seed: [1, 2]\n")
    (folder / "nested.yaml").write_text("stop: [{a: 1}]\n")
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "ab"}) + "\n" + json.dumps({"prompt": "a" * 70}) + "\n")
    (folder / "unknown.yaml").write_text("max_token: 3\n")
    return folder


def pair(task):
    return "--proposal", task / "proposal", "--aligner", task / "start"


def test_score_prints_the_contract(task, capsys):
    status, out, _ = called(capsys, "score", *pair(task), "--dataset", task / "held_out.jsonl", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["sequences"] == 16
    assert report["nll"].keys() == report["nll_per_byte"].keys() == {"proposal", "aligner", "aligned"}
    assert report["nll"]["aligned"] * report["tokens"] == pytest.approx(
        report["nll_per_byte"]["aligned"] * (report["tokens"] - report["sequences"]), rel=1e-6
    )  # one byte a token here, but for the end of sequence


def test_generate_reads_its_configuration_and_flags_override_it(task, capsys):
    words = "generate", *pair(task), "--prompt", "def", "--json", "--config", task / "config.yaml"
    first = json.loads(called(capsys, *words)[1])["completions"][0]
    assert first["completion_tokens"] <= 3
    assert first["seed"] == 5
    longer = json.loads(called(capsys, *words, "--max_tokens", 9, "--seed", 6)[1])["completions"][0]
    assert longer["seed"] == 6


def test_aligners_and_weights_repeat_together(task, capsys):
    words = "score", *pair(task), "--aligner", task / "proposal", "--dataset", task / "held_out.jsonl", "--json"
    report = json.loads(called(capsys, *words, "--weight", 0, "--weight", 0)[1])
    assert report["nll"]["aligned"] == pytest.approx(report["nll"]["proposal"])
    assert report["nll"]["aligner"][1] == pytest.approx(report["nll"]["proposal"])
    status, _, errors = called(capsys, *words, "--weight", 1)
    assert status == 2
    assert "1 --weight for 2 --aligner" in errors[0]


def test_a_later_flag_overrides_and_a_command_without_words_runs(task, capsys):
    """As everywhere: what stands at the end of a script's line counts."""
    words = "generate", *pair(task), "--prompt", "a", "--seed", 1, "--temperature", 0, "--max-tokens", 9, "--json"
    assert json.loads(called(capsys, *words, "--max_tokens", 2)[1])["completions"][0]["completion_tokens"] <= 2
    assert called(capsys, "env")[0] == 0


def test_generate_and_propose_write_their_files(task, capsys, tmp_path):
    status, _, _ = called(
        capsys, "generate", *pair(task), "--input", task / "held_out.jsonl", "--out", tmp_path / "o.jsonl", "--max_tokens", 3
    )
    assert status == 0
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 16
    words = "propose", "--proposal", task / "proposal", "--dataset", task / "held_out.jsonl", "--max_tokens", 3
    assert called(capsys, *words, "--out", tmp_path / "p.jsonl")[0] == 0
    row = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert row.keys() - {"unfinished"} == {"prompt", "chosen", "rejected"}


def test_records_that_do_not_fit_are_an_error_or_left_out(task, capsys, tmp_path):
    rows = [{"prompt": "a" * n, "completion": "xyz"} for n in (5, 60, 61, 63, 64)]  # the context holds 64, the end counts
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = "score", *pair(task), "--dataset", tmp_path / "long.jsonl", "--json"
    status, _, errors = called(capsys, *words)
    assert (status, len(errors)) == (1, 1)
    assert "long.jsonl:3: prompts[0] and completions[0] have 61 + 4 tokens, but the context holds 64" in errors[0]
    report = json.loads(called(capsys, *words, "--leave_out_long")[1])
    assert (report["sequences"], report["left_out"]) == (2, 3)
    words = "propose", "--proposal", task / "proposal", "--dataset", tmp_path / "long.jsonl", "--max_tokens", 3
    assert called(capsys, *words, "--out", tmp_path / "p.jsonl")[0] == 1
    assert called(capsys, *words, "--out", tmp_path / "p.jsonl", "--leave_out_long")[0] == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[4]) + "\n", encoding="utf-8")
    status, _, errors = called(capsys, "score", *pair(task), "--dataset", tmp_path / "none.jsonl", "--leave_out_long")
    assert (status, "no record is left: none fits into a context of 64 tokens" in errors[0]) == (1, True)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--proposal", "{}/nowhere", "--prompt", "a"), 1, "does not exist"),
        (
            ("--proposal", "{}/proposal", "--aligner", "{}/other", "--prompt", "a"),
            1,
            "does not share the proposal's vocabulary",
        ),
        (("--proposal", "{}/torn", "--prompt", "a"), 1, "cannot read the model"),
        (("--proposal", "{}/nan", "--prompt", "a"), 1, "NaN or infinite weights in lm_head.weight"),
        (("--proposal", "{}/proposal", "--prompt", ""), 1, "prompts[0] is empty"),
        (("--proposal", "{}/proposal", "--prompt", "a" * 70), 1, "prompts[0] has 70 tokens, but the context holds 64"),
        (("--proposal", "{}/proposal", "--input", "{}/bad.jsonl"), 1, "bad.jsonl:2: not JSON"),
        (
            ("--proposal", "{}/proposal", "--input", "{}/train.jsonl", "--out", "/dev/full", "--max_tokens", "1"),
            1,
            "No space left",
        ),
        (("--proposal", "{}/proposal", "--prompt", "a", "--rule", "par"), 2, "there is no rule 'par'"),
        (("--proposal", "{}/proposal", "--prompt", "a", "--temperature", "-1"), 2, "temperature must be a number at least 0"),
        (
            ("--proposal", "{}/proposal", "--prompt", "a\ud800b"),
            1,
            "prompts[0] is no valid Unicode: a lone surrogate",
        ),
        (("--proposal", "{}/proposal", "--input", "{}/long.jsonl", "--out", "o"), 1, "long.jsonl:2: prompts[0] has 70 tokens"),
        (("--proposal", "{}/proposal", "--input", "{}/train.jsonl", "--out", "{}/train.jsonl"), 2, "would replace the data"),
        (("--proposal", "{}/proposal", "--prompt", "a", "--config", "{}/list.yaml"), 2, "seed takes one value, not a list"),
        (("--proposal", "{}/proposal", "--prompt", "a", "--config", "{}/nested.yaml"), 2, "stop takes plain values"),
        (("--proposal", "{}/proposal", "--prompt", "a", "--draft", "aligner"), 2, "draft 'aligner' needs an aligner"),
        (("--proposal", "{}/proposal", "--prompt", "a", "--num_speculative_tokens", "17"), 2, "must be from 0 to 16"),
        (("--proposal", "{}/proposal"), 2, "give either --prompt or --input"),
        (("--prompt", "a"), 2, "--proposal is required"),
        (
            ("--proposal", "{}/proposal", "--prompt", "a", "--tempreature", "1"),
            2,
            "unrecognized arguments: --tempreature 1: did you mean --temperature? (see trimtab generate --help)",
        ),
        (("--proposal", "{}/proposal", "--prompt", "a", "--temp", "1"), 2, "unrecognized arguments: --temp 1"),
        (("--proposal", "{}/proposal", "--prompt", "a", "--seed", "one"), 2, "argument --seed: invalid int value: 'one'"),
        (
            ("--proposal", "{}/proposal", "--prompt", "a", "--config", "{}/unknown.yaml"),
            2,
            "'max_token': did you mean max_tokens?",
        ),
    ],
)
def test_bad_input_gets_one_line(task, capsys, tmp_path, monkeypatch, words, status, message):
    monkeypatch.chdir(tmp_path)
    got, out, errors = called(capsys, "generate", *(word.replace("{}", str(task)) for word in words))
    assert (got, out) == (status, "")
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    status, out, _ = called(capsys, command, "--help")
    assert status == 0
    assert "--config" in out
    assert "--json" in out


def test_reports_say_what_computes_the_passes(task, capsys):
    """As `eval` and `bench` do: it decides the last bits, and so what a seed gives."""
    lean, small = "lean pass, 0 of 9 weights packed", "lean pass, 0 of 5 weights packed"
    words = [*pair(task), "--aligner", task / "proposal", "--json"]
    for command in (["score", "--dataset", task / "held_out.jsonl"], ["generate", "--prompt", "ab", "--max_tokens", 1]):
        report = json.loads(called(capsys, *command, *words)[1])
        assert report["kernels"] == {"proposal": lean, "aligners": [small, lean]}


def test_a_command_without_words_runs(capsys):
    assert called(capsys, "env")[0] == 0
    assert called(capsys, "score")[0] == 2


def test_env_names_versions(capsys):
    report = json.loads(called(capsys, "env", "--json")[1])
    assert report["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
