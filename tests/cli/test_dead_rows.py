"""Commands whose models have no next token now and then: all else is done, files say what is not, and the status is 1."""

import json

import pytest
import torch

from eval_task import called, make_eval_task, read
from tiny import tiny_tokenizer
from tiny_task import write_rows
from trimtab import AlignedModel
from trimtab.data.records import read_records
from trimtab.models.base import last_of
from trimtab.models.huggingface import HuggingFaceLM

PROMPTS = ["ab", "cz", "de", "fz", "gh"]
"""Of which the second and the fourth end in the sick token."""
WHERE = [i for i, prompt in enumerate(PROMPTS) if prompt.endswith("z")]
COUNT = "trimtab {}: error: {} could not be finished; the output says which, and why"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = make_eval_task(tmp_path_factory.mktemp("task"))
    write_rows(folder / "sick.jsonl", [{"prompt": p, "completion": "ab"} for p in PROMPTS])
    return folder


@pytest.fixture(autouse=True)
def sick(monkeypatch):
    """A model gives NaN after a 'z', and never says one by itself."""
    z = tiny_tokenizer().convert_tokens_to_ids("z")
    extend, prefill = HuggingFaceLM.extend, HuggingFaceLM.prefill

    def sick_rows(rows, tokens):
        rows = rows.clone()
        rows[..., z] = -torch.inf
        rows[tokens == z] = torch.nan
        return rows

    def sick_prefill(self, state, tokens, counts):
        return sick_rows(prefill(self, state, tokens, counts), last_of(tokens, counts))

    monkeypatch.setattr(HuggingFaceLM, "extend", lambda *given: sick_rows(extend(*given), given[2]))
    monkeypatch.setattr(HuggingFaceLM, "prefill", sick_prefill)


def pair(task):
    return "--proposal", task / "proposal", "--aligner", task / "start"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generate_completes_the_others_and_says_so(task, capsys):
    words = "generate", *pair(task), "--max_tokens", 4, "--seed", 1, "--n", 2, "--json"
    status, out, errors = called(capsys, *words, "--prompt", "ab", "--prompt", "cz")
    report = json.loads(out)
    assert (status, report["failed"], errors) == (1, 2, [COUNT.format("generate", 2)])
    assert [row["finish_reason"] == "error" for row in report["completions"]] == [False, False, True, True]
    assert "the proposal gives NaN probabilities after 0 tokens" in report["completions"][2]["error"]
    alone = json.loads(called(capsys, *words, "--prompt", "ab")[1])
    assert alone["completions"] == report["completions"][:2]
    assert "error" not in alone["completions"][0]
    assert called(capsys, *words, "--prompt", "ab")[0] == 0


def test_a_file_keeps_its_errors_through_an_interruption_and_is_not_tried_again(task, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    words = "generate", *pair(task), "--input", task / "sick.jsonl", "--out", out, "--max_tokens", 4, "--seed", 1
    words += "--max_num_seqs", 2, "--json"
    status, said, _ = called(capsys, *words)
    assert (status, json.loads(said)["rows"], json.loads(said)["failed"]) == (1, 5, 2)
    whole = out.read_bytes()
    assert [i for i, row in enumerate(rows(out)) if row["finish_reason"] == "error"] == WHERE
    out.unlink()
    generate, asked = AlignedModel.generate, []

    def interrupted(self, prompts, params):
        asked.append(list(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, params)

    monkeypatch.setattr(AlignedModel, "generate", interrupted)
    assert called(capsys, *words)[0] == 130
    status, said, _ = called(capsys, *words)
    assert (status, json.loads(said)["failed"]) == (1, 2)
    assert out.read_bytes() == whole
    assert asked == [["ab", "cz"], ["de", "fz"], ["gh"], ["gh"]]


def test_a_file_with_errors_is_read_without_them(task, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    called(capsys, "generate", *pair(task), "--input", task / "sick.jsonl", "--out", out, "--max_tokens", 4)
    assert [record.prompt for record in read_records(str(out))] == ["ab", "de", "gh"]


@pytest.mark.parametrize("ranked", [False, True])
def test_propose_writes_no_such_sample_as_an_answer(task, tmp_path, capsys, ranked):
    out, more = tmp_path / "out.jsonl", ("--reward_model", task / "reward") if ranked else ()
    words = "propose", "--proposal", task / "proposal", "--dataset", task / "sick.jsonl", "--out", out, "--n", 2
    status, said, errors = called(capsys, *words, "--max_tokens", 4, *more, "--json")
    failed = 2 if ranked else 4
    assert (status, json.loads(said)["failed"], errors) == (1, failed, [COUNT.format("propose", failed)])
    dead = [row for row in rows(out) if "error" in row]
    assert len(dead) == failed
    assert all(row.keys() == {"prompt", "finish_reason", "error"} and row["prompt"].endswith("z") for row in dead)
    kept = [record.prompt for record in read_records(str(out), need="rejected")]
    assert kept == [prompt for prompt in ("ab", "de", "gh") for _ in range(1 if ranked else 2)]


def test_eval_leaves_those_pairs_out_and_a_second_run_computes_nothing(task, tmp_path, capsys, monkeypatch):
    words = (
        "eval",
        *pair(task),
        "--dataset",
        task / "sick.jsonl",
        "--judge",
        "chrf",
        "--out",
        tmp_path / "out",
        "--max_tokens",
        4,
    )
    status, said, errors = called(capsys, *words, "--json")
    report = json.loads(said)
    assert status == 1
    assert report["failed"] == 4 * 2, "of the proposal, once more, of the aligned model, and references without a likelihood"
    assert errors == [COUNT.format("eval", 8)]
    for row in report["judging"]:
        assert (row["n"], row["missing"], row["why_missing"]) == (3, 2, "an answer ended in an error")
    assert [report["texts"][name]["answers"] for name in ("proposal", "aligned")] == [3, 3]
    assert report["distribution"]["aligned"]["sequences"] == 3
    outputs = read(tmp_path / "out" / "outputs" / "aligned.json")
    assert [i for i, row in enumerate(outputs) if row.get("finish_reason") == "error"] == WHERE
    monkeypatch.setattr(AlignedModel, "stream", None)
    status, said, _ = called(capsys, *words, "--json")
    assert (status, json.loads(said)["judging"]) == (1, report["judging"])


def test_eval_of_a_file_leaves_its_errors_out(task, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    called(capsys, "generate", *pair(task), "--input", task / "sick.jsonl", "--out", out, "--max_tokens", 4)
    words = "eval", "--baseline", "references", "--system", out, "--dataset", task / "sick.jsonl", "--judge", "chrf"
    status, said, _ = called(capsys, *words, "--out", tmp_path / "e", "--json")
    assert status == 1
    assert [(row["n"], row["missing"]) for row in json.loads(said)["judging"]] == [(3, 2)]


def test_score_leaves_out_what_has_no_likelihood_and_names_it(task, tmp_path, capsys, caplog):
    data = [{"prompt": p, "completion": c} for p, c in [("ab", "cd"), ("cz", "ab"), ("de", "azb"), ("fg", "h")]]
    write_rows(tmp_path / "d.jsonl", data)
    write_rows(tmp_path / "healthy.jsonl", [data[0], data[3]])
    words = "score", *pair(task), "--json", "--dataset"
    status, said, errors = called(capsys, *words, tmp_path / "d.jsonl")
    expected = json.loads(called(capsys, *words, tmp_path / "healthy.jsonl")[1])
    report = json.loads(said)
    assert (status, report.pop("failed"), expected.pop("failed")) == (1, 2, 0)
    assert errors == [COUNT.format("score", 2)]
    assert report["nll"]["aligned"] == pytest.approx(expected["nll"]["aligned"])
    assert (report["sequences"], report["tokens"]) == (2, expected["tokens"])
    assert "d.jsonl:2 is left out: the proposal gives NaN probabilities after 0 tokens" in caplog.text
    assert "d.jsonl:3 is left out: the proposal gives NaN probabilities after 2 tokens" in caplog.text


def test_bench_times_nothing_that_cannot_go_on(task, capsys, monkeypatch):
    prefill = HuggingFaceLM.prefill
    monkeypatch.setattr(HuggingFaceLM, "prefill", lambda self, *rest: prefill(self, *rest) * torch.nan)
    words = "bench", *pair(task), "--context", 4, "--max_tokens", 3, "--repeats", 1
    status, _, errors = called(capsys, *words)
    assert status == 1
    assert "the proposal gives NaN probabilities after 0 tokens" in errors[0]
