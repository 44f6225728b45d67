"""A chat template that writes the date: a run has one, which a resumed run keeps and `--date` sets."""

import json
import shutil

import pytest

from eval_task import called, make_eval_task
from tiny_task import write_rows
from trimtab import AlignedModel
from trimtab.data import template
from trimtab.files import read_json
from trimtab.jsonlines import ResumableLines
from trimtab.models.loading import load_tokenizer

TEMPLATE = "{{ strftime_now('%A') | lower }} {% for m in messages %}{{ m.content }} {% endfor %}"
SUNDAY, MONDAY = "2026-11-29", "2026-11-30"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = make_eval_task(tmp_path_factory.mktemp("task"))
    (folder / "day.jinja").write_text(TEMPLATE, encoding="utf-8")
    talks = [
        {"prompt": [{"role": "user", "content": word}], "completion": [{"role": "assistant", "content": "xyz"}]}
        for word in ("abc", "de", "fgh", "ij")
    ]
    write_rows(folder / "chats.jsonl", talks)
    return folder


@pytest.fixture
def clock(monkeypatch):
    def set_day(day):
        monkeypatch.setattr(template, "today", lambda: day)

    set_day(SUNDAY)
    return set_day


@pytest.fixture
def words(task):
    return ["--proposal", task / "proposal", "--chat_template_path", task / "day.jinja", "--max_tokens", 6]


def commands(task, words, out):
    """Both commands that write files a part at a time."""
    shared = [*words, "--seed", 3, "--out", out, "--max_num_seqs", 1]
    return {
        "generate": ["generate", "--input", task / "chats.jsonl", *shared],
        "propose": ["propose", "--dataset", task / "chats.jsonl", *shared],
    }


@pytest.mark.parametrize("command", ["generate", "propose"])
def test_a_run_that_goes_on_the_next_day_keeps_its_date(task, words, clock, monkeypatch, capsys, tmp_path, command):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("sunday", "monday", "broken")}
    assert called(capsys, *commands(task, words, files["sunday"])[command])[0] == 0
    generate, calls = AlignedModel.generate, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AlignedModel, "generate", interrupted)
        assert called(capsys, *commands(task, words, files["broken"])[command])[0] == 130
    clock(MONDAY)
    assert called(capsys, *commands(task, words, files["monday"])[command])[0] == 0
    assert called(capsys, *commands(task, words, files["broken"])[command])[0] == 0
    assert files["broken"].read_bytes() == files["sunday"].read_bytes() != files["monday"].read_bytes()
    clock(SUNDAY)
    said = [*commands(task, words, tmp_path / "said.jsonl")[command], "--date", MONDAY]
    assert called(capsys, *said)[0] == 0
    assert (tmp_path / "said.jsonl").read_bytes() == files["monday"].read_bytes()


def test_scores_are_of_the_date_that_is_said(task, words, clock, capsys):
    score = ["score", *words[:4], "--dataset", task / "chats.jsonl", "--json"]
    sunday = json.loads(called(capsys, *score)[1])
    clock(MONDAY)
    monday = json.loads(called(capsys, *score)[1])
    assert (sunday["date"], monday["date"]) == (SUNDAY, MONDAY)
    assert sunday["nll"]["proposal"] != monday["nll"]["proposal"]
    assert json.loads(called(capsys, *score, "--date", SUNDAY)[1]) == sunday


def test_an_evaluation_keeps_its_date(task, words, clock, capsys, tmp_path):
    run = ["eval", *words, "--baseline", "references", "--system", "proposal", "--dataset", task / "chats.jsonl"]
    run += ["--judge", "rougeL", "--out", tmp_path / "out"]
    assert called(capsys, *run)[0] == 0
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert read_json(tmp_path / "out" / "run.json") == {"date": SUNDAY}
    clock(MONDAY)
    assert called(capsys, *run)[0] == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers, "nothing is asked again"
    assert called(capsys, *run, "--date", MONDAY)[0] == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes().startswith(answers)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes().count(b'"output"') == 2 * answers.count(b'"output"')
    assert read_json(tmp_path / "out" / "run.json") == {"date": MONDAY}


def test_the_date_of_a_reward_models_template_is_the_runs(task, clock, capsys, tmp_path):
    """Only its template writes one: pairs of a run that goes on, and judgements, are those of the run's day."""
    reward = shutil.copytree(task / "reward", tmp_path / "reward")
    writes = load_tokenizer(reward)
    writes.chat_template = TEMPLATE
    writes.save_pretrained(reward)
    plain = ["--proposal", task / "proposal", "--dataset", task / "chats.jsonl", "--max_tokens", 6, "--seed", 3]
    pairs = ["propose", *plain, "--reward_model", reward, "--n", 4, "--pairs", 2]
    assert called(capsys, *pairs, "--out", tmp_path / "sunday")[0] == 0
    (tmp_path / "left.partial").write_text(killed_at_once(pairs, capsys, tmp_path) + "\n")
    clock(MONDAY)
    assert called(capsys, *pairs, "--out", tmp_path / "left")[0] == 0
    assert called(capsys, *pairs, "--out", tmp_path / "said", "--date", SUNDAY)[0] == 0
    assert (tmp_path / "sunday").read_bytes() == (tmp_path / "left").read_bytes() == (tmp_path / "said").read_bytes()
    judged = ["eval", *plain, "--baseline", "references", "--system", "proposal", "--judge", reward, "--out", tmp_path / "out"]
    judgements = []
    for more in ([], ["--date", SUNDAY], ["--date", SUNDAY]):
        assert called(capsys, *judged, *more)[0] == 0
        judgements.append((tmp_path / "out" / "judgements.jsonl").read_text().count("\n"))
    assert judgements[0] < judgements[1] == judgements[2], "another day is another question, the same day is not"


def killed_at_once(words, capsys, tmp_path):
    """What a run that is killed before its first row leaves."""
    headers = []

    def killed(self, rows):
        headers.append(json.dumps(self._header))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumableLines, "write", killed)
        assert called(capsys, *words, "--out", tmp_path / "killed")[0] == 130
    return headers[0]


@pytest.mark.parametrize("command", ["generate", "score", "propose", "eval"])
def test_a_template_for_no_chat_is_refused(task, capsys, tmp_path, command):
    template = ["--proposal", task / "proposal", "--chat_template_path", task / "day.jinja"]
    data = ["--input" if command == "generate" else "--dataset", task / "train.jsonl"]
    evaluated = ["--out", tmp_path / "e", "--system", "proposal", "--baseline", "references", "--judge", "chrf"]
    more = {"propose": ["--out", tmp_path / "o"], "eval": evaluated}
    status, _, errors = called(capsys, command, *template, *data, *more.get(command, []))
    assert (status, "--chat_template_path is for chats, and no prompt is one" in errors[0]) == (2, True)
    status, _, errors = called(capsys, "generate", *template, "--prompt", "hi")
    assert (status, "--chat_template_path is for chats, and --prompt is a text" in errors[0]) == (2, True)


@pytest.mark.parametrize("left", ['{"proposal": "path"}\n', '{"proposal": null}\n', "[]\n"])
def test_what_another_command_left_is_refused_by_name(task, capsys, tmp_path, left):
    (tmp_path / "out.partial").write_text(left)
    words = ["propose", "--proposal", task / "proposal", "--dataset", task / "chats.jsonl", "--out", tmp_path / "out"]
    status, _, errors = called(capsys, *words, "--max_tokens", 2)
    assert status == 2
    assert "is left from a run with other" in errors[0]


def test_an_evaluation_does_not_write_into_another_commands_run(task, words, capsys, tmp_path):
    (tmp_path / "run.json").write_text('{"date": "2026-11-29", "objective": "likelihood"}')
    run = ["eval", *words, "--baseline", "references", "--system", "proposal", "--dataset", task / "chats.jsonl"]
    status, _, errors = called(capsys, *run, "--judge", "rougeL", "--out", tmp_path)
    assert status == 2
    assert "holds a run of another command: name another folder" in errors[0]


def test_training_on_texts_keeps_no_date(task, capsys, tmp_path):
    """So runs of earlier versions go on."""
    train = ["train", "--proposal", task / "proposal", "--aligner", task / "start", "--dataset", task / "train.jsonl"]
    train += ["--output_dir", tmp_path / "out", "--max_steps", 1, "--report_to", "none", "--use_cpu", "true"]
    assert called(capsys, *train, "--train_draft", "false")[0] == 0
    assert read_json(tmp_path / "out" / "run.json")["date"] is None


def test_training_keeps_its_date(task, words, clock, capsys, tmp_path):
    train = ["train", *words[:4], "--aligner", task / "start", "--dataset", task / "chats.jsonl"]
    train += [
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        1,
        "--dev_fraction",
        0.5,
        "--report_to",
        "none",
        "--use_cpu",
        "true",
        "--train_draft",
        "false",
    ]
    assert called(capsys, *train)[0] == 0
    run = read_json(tmp_path / "out" / "run.json")
    assert run["date"] == SUNDAY
    clock(MONDAY)
    assert called(capsys, *train)[0] == 0
    assert read_json(tmp_path / "out" / "run.json") == run
    status, _, errors = called(capsys, *train, "--date", MONDAY)
    assert status == 2
    assert "holds a run with d" in errors[0]


@pytest.mark.parametrize("command", ["generate", "score", "propose", "eval", "train"])
def test_a_date_that_nothing_writes_is_refused(task, capsys, tmp_path, command):
    data = ["--input" if command == "generate" else "--dataset", task / "chats.jsonl"]
    more = {
        "generate": [],
        "score": [],
        "propose": ["--out", tmp_path / "out.jsonl"],
        "eval": ["--out", tmp_path / "out", "--system", "proposal", "--baseline", "references", "--judge", "rougeL"],
        "train": ["--aligner", task / "start", "--output_dir", tmp_path / "out", "--use_cpu", "true"],
    }[command]
    status, _, errors = called(capsys, command, "--proposal", task / "proposal", *data, *more, "--date", SUNDAY)
    assert status == 2
    assert errors[0].split(": error: ")[1].startswith("date 2026-11-29 would change nothing: the chat template does not write")
    status, _, errors = called(capsys, command, "--proposal", task / "proposal", *data, *more, "--date", "29.11.2026")
    assert status == 2
    assert "date must be YYYY-MM-DD" in errors[0]
