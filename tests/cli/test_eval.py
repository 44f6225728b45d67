"""`trimtab eval` as a user calls it: whole runs, killed runs, sweeps, and one line for each wrong use."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
import yaml

from eval_task import called, fair, make_eval_task, read, timeless
from scripted import scripted
from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.evaluate.options import EvalOptions
from trimtab.judges.rewards.classifier import RewardModel

JUDGE = [{"id": "judge"}]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = make_eval_task(tmp_path_factory.mktemp("task"))
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(folder / "bare.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_rows(folder / "foreign.jsonl", [{"prompt": "def", "completion": "это ответ"}])
    write_rows(folder / "surrogate.jsonl", [{"prompt": "def", "completion": "a\ud83d"}])
    write_rows(folder / "long.jsonl", [*rows[:1], {"prompt": "a" * 70}])
    write_rows(folder / "empty_chat.jsonl", [{"prompt": [{"role": "user", "content": "def"}], "chosen": []}])
    for name, letters in (("good", "xyz"), ("bad", "abc")):
        outputs = [{"instruction": row["prompt"], "output": letters * (1 + i % 3)} for i, row in enumerate(rows)]
        (folder / f"{name}.json").write_text(json.dumps(outputs), encoding="utf-8")
        (folder / f"{name}_some.json").write_text(json.dumps(outputs[:5]), encoding="utf-8")
    (folder / "other").mkdir()
    (folder / "other" / "reward").symlink_to(folder / "reward")
    save_tiny(folder / "no_template", tiny_model("llama", 28, seed=1), tiny_tokenizer())
    (folder / "file").write_text("", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judge():
    with scripted(fair, models=JUDGE) as server:
        yield server


def test_prompts_that_do_not_fit_are_an_error_or_left_out(task, capsys, tmp_path):
    words = "eval", *models(task), "--dataset", task / "long.jsonl", "--judge", task / "reward", "--out", tmp_path / "out"
    status, _, errors = called(capsys, *words)
    assert (status, "long.jsonl:2: prompts[0] has 70 tokens" in errors[0]) == (1, True)
    assert called(capsys, *words, "--leave_out_long")[0] == 0
    assert read(tmp_path / "out" / "results.json")["dataset"]["prompts"] == 1
    words = ("eval", "--system", task / "good.json", "--baseline", task / "bad.json", "--judge", task / "reward")
    words += ("--dataset", task / "prompts.jsonl", "--out", tmp_path / "o", "--leave_out_long")
    status, _, errors = called(capsys, *words)
    assert (status, "--leave_out_long goes by the context of a model" in errors[0]) == (2, True)


def models(task, *more):
    return "--proposal", task / "proposal", "--aligner", task / "start", "--max_tokens", 6, *more


def evaluated(capsys, *words):
    """What one call prints as JSON, which must succeed."""
    status, out, errors = called(capsys, "eval", *words, "--json")
    assert (status, errors) == (0, [])
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def ran(task, judge, tmp_path_factory):
    return tmp_path_factory.mktemp("ran") / "deep" / "out"


@pytest.fixture
def done(task, judge, ran, capsys):
    """The words of a whole run with every kind of judge, and its results; the first test that needs it waits for it."""
    words = [*models(task, "--dataset", task / "prompts.jsonl", "--seed", 4, "--out", ran)]
    words += ["--judge", f"{judge.url}#judge", "--judge", task / "reward", "--judge", "rougeL", "--prompt_price", 2]
    return words, read(ran / "results.json") if ran.exists() else evaluated(capsys, *words)


# ---- whole runs


def test_a_run_prints_its_results_and_says_where_they_come_from(task, done, ran):
    _, results = done
    assert [(row["judge"], row["pair"], row["n"]) for row in results["judging"]] == [
        *((name, pair, 12) for name in ("judge", "reward") for pair in ("main", "null", "references")),
        *(("rougeL", pair, 12) for pair in ("main", "null")),
    ]
    known = results["provenance"]
    model = AlignedModel.from_pretrained(task / "proposal", [task / "start"])
    assert known["models"]["proposal"]["weights"] == model.proposal.fingerprint
    assert known["models"][f"aligner {task / 'start'}"]["weights"] == model.aligners[0].fingerprint
    assert known["judges"]["reward"]["weights"].startswith("sha256:")
    assert (known["judges"]["judge"]["criterion"], known["judges"]["rougeL"]["tokenizer"]) == ("helpful", "ascii")
    assert known["judges"]["rougeL"]["package"].startswith("rouge_score 0.")
    assert known["dataset"]["sha256"] == results["dataset"]["sha256"]
    assert len(known["dataset"]["sha256"]) == 64
    assert known["sampling"] == {"seed": 4, "seed_of_null": 1_000_007, "params": repr(SamplingParams(max_tokens=6, seed=4))}
    assert known["options"]["out"] == str(ran)
    assert known["options"]["judge"][2] == "rougeL"
    assert known["decoding"] == {"rule": "product", "weight": [1.0]}
    assert known["systems"]["system"] == {"kind": "aligned", "name": "aligned"}
    packages = known["environment"]["packages"]
    assert packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    cost = results["provenance"]["judges"]["judge"]["cost"]
    assert cost["amount"] == pytest.approx(cost["prompt_tokens"] * 2e-6)


def test_the_same_run_again_costs_nothing(done, judge, ran, capsys, monkeypatch):
    words, results = done
    before = len(judge.asked)
    monkeypatch.setattr(AlignedModel, "stream", None)
    again = evaluated(capsys, *words)
    assert len(judge.asked) == before
    assert timeless(again) == timeless(results)
    status, out, _ = called(capsys, "eval", *words)
    assert status == 0
    assert "judge: aligned against proposal\n  win rate " in out
    assert f"report: {ran / 'report.html'}" in out


def test_an_annotation_file_of_a_run_is_summarised_alone(done, ran, capsys):
    _, results = done
    for row in results["judging"]:
        found = evaluated(capsys, "--annotations", ran / "annotations" / f"{row['judge']}-{row['pair']}.json")
        for name in ("n", "win_rate", "win_rate_interval", "length_controlled_win_rate", "length"):
            assert found[name] == row[name]


def test_files_are_compared_without_a_model_and_outputs_of_a_run_are_such_files(task, done, ran, capsys, tmp_path):
    _, results = done
    words = "--baseline", ran / "outputs" / "proposal.json", "--system", ran / "outputs" / "aligned.json"
    again = evaluated(capsys, *words, "--dataset", task / "prompts.jsonl", "--judge", "rougeL", "--out", tmp_path)
    rates = [row["win_rate"] for row in results["judging"] if (row["judge"], row["pair"]) == ("rougeL", "main")]
    assert [row["win_rate"] for row in again["judging"]] == rates
    assert "criterion" not in again["dataset"]
    assert len(again["provenance"]["systems"]["system"]["sha256"]) == 64
    some = evaluated(capsys, *words, "--max_prompts", 3, "--out", tmp_path / "some")
    assert (some["dataset"]["prompts"], some["dataset"]["path"], some["judging"]) == (3, str(words[1]), [])


def test_what_generate_writes_is_a_system(task, done, capsys, tmp_path):
    """`trimtab generate` draws every prompt with one seed, `trimtab eval` prompt i with seed + i; both are answers."""
    words = models(task, "--input", task / "prompts.jsonl", "--seed", 4, "--out", tmp_path / "mine.jsonl")
    assert called(capsys, "generate", *words)[0] == 0
    more = "--proposal", task / "proposal", "--max_tokens", 6, "--seed", 4, "--dataset", task / "prompts.jsonl"
    evaluated(capsys, "--system", tmp_path / "mine.jsonl", *more, "--out", tmp_path / "out")
    mine = read(tmp_path / "out" / "outputs" / "mine.json")
    theirs = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["instruction"], row["output"]) for row in mine] == [(row["prompt"], row["completion"]) for row in theirs]


def test_chats_and_texts_asked_as_chats_are_the_same(task, capsys, tmp_path):
    rows = [json.loads(line) for line in (task / "bare.jsonl").read_text(encoding="utf-8").splitlines()]
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    write_rows(tmp_path / "chats.jsonl", chats)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"apply_chat_template": True, "max_tokens": 5}), encoding="utf-8")
    one = evaluated(capsys, *models(task), "--dataset", tmp_path / "chats.jsonl", "--max_tokens", 5, "--out", tmp_path / "1")
    words = *models(task)[:4], "--config", tmp_path / "config.yaml", "--dataset", task / "bare.jsonl", "--out", tmp_path / "2"
    other = evaluated(capsys, *words)
    plain = evaluated(capsys, *words, "--apply_chat_template", "false", "--out", tmp_path / "3")
    assert one["texts"] == other["texts"] != plain["texts"]
    files = [read(tmp_path / str(i) / "outputs" / "aligned.json") for i in (1, 2)]
    assert files[0] == files[1]
    assert [row["instruction"] for row in files[0]] == [row["prompt"] for row in rows]


def test_a_limit_of_cost_ends_with_one_line_that_says_how_to_go_on(task, judge, capsys, tmp_path):
    words = ["--baseline", task / "bad.json", "--system", task / "good.json", "--judge", judge.url, "--out", tmp_path / "o"]
    words += ["--dataset", task / "prompts.jsonl", "--prompt_price", 1e6, "--completion_price", 1e6, "--max_cost"]
    status, out, errors = called(capsys, "eval", *words, 3500, "--json")
    assert (status, out, len(errors)) == (1, "", 1)
    assert "of max_cost 3500" in errors[0]
    assert "raise max_cost and run again" in errors[0]
    assert [row["pair"] for row in read(tmp_path / "o" / "results.json")["judging"]] == ["main"]
    assert [row["pair"] for row in evaluated(capsys, *words, 1e5)["judging"]] == ["main", "references"]


# ---- kills


@pytest.mark.slow
def test_killed_while_it_answers_and_while_it_judges_it_ends_as_if_it_had_not_been(task, capsys, tmp_path):
    """`kill -9` in the middle of either; then all figures are those of a run that was left alone, and each question was
    asked once but for the eight that were in flight."""
    rows = [{"prompt": f"{a}{b}", "completion": "xyz"} for a in "defgh" for b in "ijkl"]
    data = write_rows(tmp_path / "d.jsonl", rows)
    asked: Counter[str] = Counter()

    def slowly(question, number):
        asked[json.dumps(question.body["messages"])] += 1
        return dataclasses.replace(fair(question), delay=0.05)

    with scripted(slowly, models=JUDGE) as server:
        words = [*models(task, "--dataset", data, "--judge", server.url, "--max_num_seqs", 1, "--max_tokens", 50)]
        out = tmp_path / "killed"
        command = [sys.executable, "-m", "trimtab", "eval", *map(str, words), "--out", str(out)]

        def lines(name):
            return (out / name).read_bytes().count(b"\n") if (out / name).exists() else 0

        for far in (lambda: lines("answers.jsonl") >= 25, lambda: len(server.asked) >= 30):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
            while not far() and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (out / "results.json").exists()
        assert lines("answers.jsonl") >= 60
        assert lines("judgements.jsonl") < 120
        resumed = evaluated(capsys, *words, "--out", out)
        assert sum(asked.values()) - len(asked) <= 8
        whole = evaluated(capsys, *words, "--out", tmp_path / "whole")
    assert timeless(resumed) == timeless(whole)
    for path in (tmp_path / "whole").glob("*/*.json"):
        assert read(path) == read(out / path.relative_to(tmp_path / "whole"))


# ---- sweeps


def test_a_sweep_picks_on_some_prompts_and_reports_on_the_others(task, judge, capsys, tmp_path):
    words = [*models(task, "--dataset", task / "prompts.jsonl", "--judge", f"{judge.url}#judge", "--null", "false")]
    sweep = "--sweep_weight", 0.5, "--sweep_weight", 2, "--sweep_rule", "product", "--sweep_rule", "geometric"
    results = evaluated(capsys, *words, *sweep, "--dev_fraction", 0.34, "--out", tmp_path / "s")
    frontier = results["frontier"]
    assert (results["dataset"]["prompts"], frontier["prompts"]) == (8, 4)
    assert [(p["rule"], p["weight"]) for p in frontier["points"]] == [
        *(("product", 0.5), ("product", 2.0), ("geometric", 0.5), ("geometric", 2.0))
    ]
    [pick] = [point for point in frontier["points"] if point["picked"]]
    assert pick["win_rate"] == max(point["win_rate"] for point in frontier["points"])
    assert results["provenance"]["decoding"] == {"rule": pick["rule"], "weight": [pick["weight"]]}
    reported = read(tmp_path / "s" / "outputs" / "aligned.json")
    write_rows(tmp_path / "reported.jsonl", [{"prompt": row["instruction"]} for row in reported])
    alone = [*words[:-4], "--null", "false", "--rule", pick["rule"], "--weight", pick["weight"], "--out", tmp_path / "a"]
    alone[alone.index("--dataset") + 1] = tmp_path / "reported.jsonl"
    assert evaluated(capsys, *alone)["texts"] == results["texts"]
    assert read(tmp_path / "a" / "outputs" / "aligned.json") == reported
    assert "Win rate against distance" in (tmp_path / "s" / "report.html").read_text(encoding="utf-8")


def test_development_prompts_of_their_own_are_tried_without_those_that_are_reported_on(task, capsys, tmp_path, caplog):
    words = [*models(task, "--dataset", task / "prompts.jsonl", "--max_prompts", 4, "--judge", "rouge1", "--out", tmp_path)]
    more = "--sweep_weight", 1, "--sweep_weight", 1, "--dev_dataset", task / "prompts.jsonl", "--null", "false"
    results = evaluated(capsys, *words, *more)
    assert (results["dataset"]["prompts"], results["frontier"]["prompts"]) == (4, 8)
    assert len(results["frontier"]["points"]) == 1
    assert "4 prompts of --dev_dataset are reported on" in caplog.text


# ---- wrong use

BARE = "--dataset", "{}/prompts.jsonl", "--out", "{}/out"
BOTH = "--proposal", "{}/proposal", "--aligner", "{}/start", *BARE
FILES = "--baseline", "{}/bad.json", "--system", "{}/good.json", *BARE
SWEEP = *BOTH, "--judge", "chrf", "--sweep_weight", "1"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--out", "{}/out"), 2, "--dataset is required, unless --baseline is a file of outputs"),
        (BOTH[:6], 2, "--out is required"),
        (BARE, 2, "--proposal is required for the systems proposal and aligned"),
        ((*BOTH[:2], *BARE), 2, "--aligner is required for the system aligned"),
        ((*BOTH, "--system", "alligned"), 2, "--system: 'alligned' is no system: give proposal, aligned, references,"),
        ((*BOTH, "--baseline", "http://"), 2, "--baseline: 'http://' is no endpoint"),
        ((*BOTH, "--system", "proposal"), 2, "--system and --baseline are both proposal"),
        (
            (*BOTH, "--judge", "rouge3"),
            2,
            "--judge 'rouge3' is none: give URL#MODEL, a reward model's folder or hub id, or",
        ),
        ((*BOTH, "--judge", "http://x?y"), 2, "'http://x?y' is no endpoint"),
        ((*BOTH, "--judge", "{}/nowhere"), 2, "nowhere' is none"),
        ((*BOTH, "--judge", "chrf", "--judge", "chrf"), 2, "--judge: two are called 'chrf'"),
        ((*BOTH, "--judge", "{}/reward", "--judge", "{}/other/reward"), 2, "--judge: two are called 'reward'"),
        ((*BOTH, "--judge", "{url}", "--criterion", "nice"), 2, "criterion must be one of helpful, harmless, summary"),
        ((*BOTH, "--judge", "chrf", "--criterion", "harmless"), 2, "--criterion needs a --judge that is an endpoint"),
        ((*BOTH, "--judge", "{url}", "--orders", "second"), 2, "argument --orders: invalid choice: 'second'"),
        ((*BOTH, "--judge", "rougeL", "--rouge_tokenizer", "french"), 2, "french"),
        ((*BOTH, "--judge", "chrf", "--rouge_tokenizer", "unicode"), 2, "--rouge_tokenizer needs a --judge that is rouge1"),
        ((*BOTH, "--length_control", "none"), 2, "--length_control must be one of auto, alpaca_eval, length-only fit"),
        (
            (*BOTH, "--length_control", "alpaca_eval"),
            2,
            "--length_control alpaca_eval: AlpacaEval's difficulties are for",
        ),
        ((*BOTH, "--n", "2"), 2, "--n must be 1"),
        ((*BOTH, "--temperature", "-1"), 2, "temperature must be a number at least 0"),
        ((*BOTH, "--max_prompts", "0"), 2, "--max_prompts must be at least 1, not 0"),
        ((*BOTH, "--concurrency", "0"), 2, "concurrency must be at least 1, not 0"),
        ((*BOTH, "--judge", "chrf", "--max_cost", "1"), 2, "--max_cost needs a --judge that is an endpoint"),
        ((*BOTH, "--judge", "{url}", "--max_cost", "1"), 2, "max_cost needs prompt_price and completion_price"),
        ((*BOTH, "--judge", "{url}", "--prompt_price", "-1"), 2, "prompt_price must be a number of at least 0"),
        ((*FILES, *BOTH[:2]), 2, "--proposal is given, but neither --system nor --baseline is proposal or aligned"),
        ((*FILES, "--weight", "1"), 2, "--weight is given, but neither"),
        ((*SWEEP, "--weight", "1"), 2, "--weight and --sweep_weight contradict each other"),
        ((*SWEEP, "--rule", "geometric", "--sweep_rule", "product"), 2, "--rule and --sweep_rule contradict each other"),
        ((*SWEEP, "--dev_dataset", "x", "--dev_fraction", "0.5"), 2, "--dev_fraction and --dev_dataset contradict each other"),
        ((*SWEEP, "--dev_fraction", "0"), 2, "--dev_fraction must be between 0 and 1, not 0"),
        ((*SWEEP, "--dev_fraction", "1"), 2, "--dev_fraction must be between 0 and 1, not 1"),
        ((*SWEEP, "--dev_fraction", "0.01"), 2, "--dev_fraction 0.01 of 12 different prompts leaves one side empty"),
        ((*SWEEP, "--max_kl", "-1"), 2, "--max_kl must be at least 0"),
        ((*SWEEP, "--sweep_weight", "nan"), 2, "--sweep_weight: weight must be"),
        ((*SWEEP, "--sweep_rule", "par"), 2, "--sweep_rule: there is no rule 'par'"),
        ((*SWEEP, "--sweep_rule", "candidates(n=2)"), 2, "has no row in closed form"),
        ((*SWEEP, "--system", "references"), 2, "--sweep_weight needs --system aligned with one --aligner"),
        ((*SWEEP, "--aligner", "{}/start"), 2, "--sweep_weight needs --system aligned with one --aligner"),
        ((*BOTH, "--sweep_weight", "1"), 2, "--sweep_weight needs a --judge to pick by"),
        ((*SWEEP, "--dev_dataset", "{}/prompts.jsonl"), 1, "prompts.jsonl: every prompt is also one that is reported on"),
        ((*BOTH, "--sweep_rule", "product"), 2, "--sweep_rule needs --sweep_weight"),
        ((*BOTH, "--max_kl", "0"), 2, "--max_kl needs --sweep_weight"),
        ((*BOTH, "--dev_fraction", "0.5"), 2, "--dev_fraction needs --sweep_weight"),
        ((*BOTH, "--dev_dataset", "x"), 2, "--dev_dataset needs --sweep_weight"),
        (("--annotations", "x.json", "--out", "y"), 2, "--out has no meaning with --annotations"),
        (("--annotations", "x.json", "--judge", "chrf"), 2, "--judge has no meaning with --annotations"),
        (("--annotations", "{}/nowhere.json"), 1, "nowhere.json"),
        ((*BOTH, "--out", "{}/file"), 2, "file is a file: name a folder"),
        ((*BOTH, "--out", "{}/file/x"), 2, "file is a file: name a folder"),
        ((*BOTH, "--out", "/proc/x"), 2, "--out /proc/x: nothing can be written in /proc: "),
        ((*BOTH, "--dataset", "{}/nowhere.json"), 1, "nowhere.json"),
        ((*BOTH, "--dataset", "{}/nowhere.jsonl"), 1, "nowhere.jsonl: there is no such file"),
        ((*BOTH, "--dataset", "{}/surrogate.jsonl"), 1, "surrogate.jsonl:1: wanted answer is no valid Unicode"),
        (
            (*BOTH, "--dataset", "{}/bare.jsonl", "--judge", "rougeL"),
            1,
            "bare.jsonl: has no wanted answers, which --judge",
        ),
        ((*BOTH, "--dataset", "{}/foreign.jsonl", "--judge", "rougeL"), 2, "--rouge_tokenizer"),
        ((*BOTH, "--dataset", "{}/bare.jsonl", "--baseline", "references"), 1, "not every prompt has a wanted answer"),
        ((*BOTH, "--dataset", "{}/empty_chat.jsonl", "--judge", "chrf"), 1, "has no wanted answers"),
        ((*BOTH, "--baseline", "{}/bad_some.json"), 1, "bad_some.json: has no output for the prompt of"),
        ((*FILES, "--system", "{}/good_some.json"), 1, "good_some.json: has no output for the prompt of"),
    ],
)
def test_wrong_use_gets_one_line_before_a_model_is_loaded(task, judge, capsys, monkeypatch, words, status, message):
    def refuse(*args, **settings):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AlignedModel, "from_pretrained", refuse)
    monkeypatch.setattr(RewardModel, "from_pretrained", refuse)
    before = len(judge.asked)
    got, out, errors = called(capsys, "eval", *(word.replace("{}", str(task)).replace("{url}", judge.url) for word in words))
    assert (got, out, len(errors)) == (status, "", 1)
    assert message in errors[0]
    assert not (task / "out").exists()
    assert len(judge.asked) == before


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((*BOTH, "--dataset", "{}/long.jsonl"), 1, "long.jsonl:2: prompts[0] has 70 tokens"),
        ((*BOTH, "--weight", "1", "--weight", "2"), 2, "2 --weight for 1 --aligner"),
        ((*BOTH, "--rule", "par"), 2, "there is no rule 'par'"),
        ((*BOTH, "--proposal", "{}/nowhere"), 1, "does not exist"),
        ((*BOTH, "--proposal", "{}/no_template", "--apply_chat_template"), 1, "the tokenizer has no chat template"),
        (
            (*BOTH, "--apply_chat_template", "--judge", "{}/reward"),
            1,
            "reward cannot take it: prompts[0] is a chat, but the reward model's",
        ),
    ],
)
def test_what_only_a_loaded_model_can_tell_is_told_before_it_answers(task, capsys, monkeypatch, words, status, message):
    monkeypatch.setattr(AlignedModel, "stream", None)
    got, out, errors = called(capsys, "eval", *(word.replace("{}", str(task)) for word in words))
    assert (got, out, len(errors)) == (status, "", 1)
    assert message in errors[0]
    assert not (task / "out").exists()


@pytest.mark.parametrize("flag", ["--judge", "--system", "--baseline"])
def test_an_endpoint_that_is_down_is_said_soon_and_first(task, capsys, monkeypatch, flag):
    monkeypatch.setattr(AlignedModel, "from_pretrained", None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = [word.replace("{}", str(task)) for word in BOTH]
    started = time.monotonic()
    status, out, errors = called(capsys, "eval", *words, flag, f"{url}#m")
    assert time.monotonic() - started < 8
    assert (status, out, len(errors)) == (1, "", 1)
    assert f"no endpoint is left: {url} cannot be reached" in errors[0]
    assert not (task / "out").exists()


@pytest.mark.parametrize("flag", ["--judge", "--system"])
def test_an_endpoint_that_does_not_know_us_is_said_first(task, capsys, monkeypatch, flag):
    monkeypatch.setattr(AlignedModel, "from_pretrained", None)
    words = [word.replace("{}", str(task)) for word in BOTH]

    class Denied(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such key"}}')

        def log_message(self, *args):
            """Silence."""

    with HTTPServer(("127.0.0.1", 0), Denied) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        status, _, errors = called(capsys, "eval", *words, flag, f"http://127.0.0.1:{server.server_port}#m")
        server.shutdown()
    assert status == 1
    assert "answered 401: no such key" in errors[0]
    assert not (task / "out").exists()


def test_a_password_is_written_nowhere(task, judge, capsys, tmp_path):
    url = judge.url.replace("http://", "http://me:secret@")
    words = "--baseline", task / "bad.json", "--system", task / "good.json", *("--dataset", task / "prompts.jsonl")
    evaluated(capsys, *words, "--judge", url, "--judge", f"{url}#other", "--out", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()] == []


def test_a_data_set_may_be_in_alpaca_evals_json(task, capsys, tmp_path):
    """With wanted answers for some prompts; texts and figures are those of the same data as JSON Lines."""
    rows = [json.loads(line) for line in (task / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row if i % 2 else {"prompt": row["prompt"]} for i, row in enumerate(rows)]
    write_rows(tmp_path / "d.jsonl", rows)
    theirs = [{"instruction": row["prompt"], "output": row.get("completion"), "dataset": "x"} for row in rows]
    (tmp_path / "d.json").write_text(json.dumps(theirs), encoding="utf-8")
    one, other = (
        evaluated(capsys, *models(task, "--judge", "rougeL", "--dataset", tmp_path / name, "--out", tmp_path / name[-1]))
        for name in ("d.json", "d.jsonl")
    )
    assert [(row["n"], row["missing"]) for row in one["judging"]] == [(6, 6), (6, 6)]
    for key in ("judging", "texts", "distribution", "likelihood"):
        assert one[key] == other[key]


def test_help_names_every_flag(capsys):
    status, out, _ = called(capsys, "eval", "--help")
    assert status == 0
    for field in dataclasses.fields(EvalOptions):
        assert f"--{field.name} " in out
        assert field.metadata["help"]
