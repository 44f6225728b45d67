"""What holds for every judge, ours and another package's: made without work, sure of the same, and JSON all through."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval_task import called, fair, make_eval_task, read
from rewards_of import package, write_functions, write_scores
from scripted import scripted
from tiny_task import write_rows
from trimtab.errors import DataError, InvalidOption
from trimtab.evaluate.options import EvalOptions
from trimtab.journal import Journal
from trimtab.judges.base import Judge, Pair
from trimtab.judges.kinds import JUDGES, judge_help, make_judge, options_read, parse_judge
from trimtab.judges.references import METRICS
from trimtab.judges.rewards.classifier import RewardModel

ANSWERS = ["xyz", "abc", "xx yy", "cab", "zy", "xyz"]
PROMPTS = [f"p{letter}" for letter in "abcdef"]
PAIRS = [
    Pair(prompt, prompt, one, other, "xyz xx", {"answer": "xyz"})
    for prompt, one, other in zip(PROMPTS, ANSWERS, ANSWERS[::-1], strict=True)
]
ASKED = SimpleNamespace(
    prompts=PROMPTS, references=["xyz xx"] * 6, columns=[{"answer": "xyz"}] * 6, sources=[f"d:{i}" for i in range(6)]
)
OPTIONS = vars(EvalOptions()) | {"dtype": "float32", "device": "cpu"}
SPECS = {
    "endpoint": "endpoint:{url}#judge",
    "endpoint, as ever": "{url}#judge",
    "reference": "reference:rougeL",
    "reference, as ever": "chrf",
    "reward model": "reward:model:{task}/reward",
    "reward model, as ever": "{task}/reward",
    "reward function": "reward:{functions}:wordy",
    "reward function of columns": "reward:function:{functions}:graded",
    "reward file": "reward:file:{scores}",
    "another package's": "shorter:9",
    "another package's reward": "reward:letter:x",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    task = make_eval_task(folder / "task")
    with scripted(fair, models=[{"id": "judge"}]) as server:
        yield {
            "url": server.url,
            "task": str(task),
            "functions": str(write_functions(folder)),
            "scores": str(write_scores(folder, PROMPTS, sorted({*ANSWERS}))),
            "server": server,
        }


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    with package(tmp_path / "package", monkeypatch):
        yield


@pytest.fixture(params=SPECS)
def text(request, places):
    return SPECS[request.param].format(**places)


def ready(text):
    judge = make_judge(text, OPTIONS)
    judge.reach()
    judge.check(ASKED, "the data")
    judge.load(ASKED, "2026-11-30")
    return judge


def test_a_judge_is_made_without_asking_or_loading(text, places, monkeypatch):
    monkeypatch.setattr(RewardModel, "from_pretrained", None)
    before = len(places["server"].asked)
    judge = make_judge(text, OPTIONS)
    assert isinstance(judge, Judge)
    assert judge.kind == parse_judge(text)[0].name
    assert judge.name
    assert judge.called == f"--judge {text}"
    assert options_read(text) <= OPTIONS.keys()
    assert options_read(judge) == frozenset()
    assert len(places["server"].asked) == before


def test_what_is_kept_is_not_asked_again(text, places, tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        found = ready(text).judge(PAIRS, journal)
    kept = (tmp_path / "j.jsonl").read_bytes()
    assert kept
    before = sum(asked.path.endswith("completions") for asked in places["server"].asked)
    with Journal(tmp_path / "j.jsonl") as journal:
        assert ready(text).judge(PAIRS, journal) == found
    assert (tmp_path / "j.jsonl").read_bytes() == kept
    assert sum(asked.path.endswith("completions") for asked in places["server"].asked) == before


def test_preferences_are_from_1_to_2_and_turn_with_the_answers(text, tmp_path):
    turned = [Pair(p.prompt, p.instruction, p.output_2, p.output_1, p.reference, p.columns) for p in PAIRS]
    judge = ready(text)
    with Journal(tmp_path / "j.jsonl") as journal:
        for one, other in zip(judge.judge(PAIRS, journal), judge.judge(turned, journal), strict=True):
            assert 1 <= one.preference <= 2
            assert one.preference + other.preference == pytest.approx(3)
            assert one.why_missing == ""
        same = judge.judge([Pair("pa", "pa", "xyz", "xyz", "xyz xx", {"answer": "xyz"})], journal)
        assert same[0].preference == 1.5


def test_what_it_is_and_costs_is_json(text, tmp_path):
    judge = ready(text)
    with Journal(tmp_path / "j.jsonl") as journal:
        judge.judge(PAIRS[:2], journal)
    assert json.loads(json.dumps(judge.describe())) == judge.describe()
    assert judge.describe()
    assert (judge.cost() is None) == (judge.questions == 0)
    assert json.loads(json.dumps(judge.cost())) == judge.cost()


@pytest.mark.parametrize(
    ("text", "pair", "why"),
    [
        ("reference:rougeL", Pair("pa", "pa", "x", "y", None), "no reference"),
        ("reward:{functions}:picky", Pair("pa", "pa", "x", "q"), "rewards.picky gives no score"),
        ("shorter:2", Pair("pa", "pa", "xxx", "q"), "more than 2 letters"),
    ],
)
def test_a_preference_that_is_missing_says_why(text, pair, why, places, tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        judged = ready(text.format(**places)).judge([pair, PAIRS[0]], journal)
    assert (judged[0].preference, judged[0].why_missing) == (None, why)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("endpoint:localhost", "'localhost' is no endpoint"),
        ("http://", "'http://' is no endpoint"),
        ("reference:rouge3", "there is no metric 'rouge3'"),
        ("rouge3", "--judge 'rouge3' is none: give URL#MODEL, a reward model's folder or hub id, or one of rouge1"),
        ("sorter:9", "--judge 'sorter:9' is none: .*shorter: did you mean shorter"),
        ("reward:org/model", "--judge reward:org/model: 'org/model' is no reward: give MODULE.py:FUNCTION, or KIND:ARGUMENT"),
        ("reward:{functions}:nobody", "has no function 'nobody'; it has: wordy, text"),
        ("reward:file:nowhere.jsonl", "--judge reward:file:nowhere.jsonl: there is no file of scores 'nowhere.jsonl'"),
        ("reward:letter:xy", "--judge reward:letter:xy: letter:xy: give one letter"),
        ("shorter:few", "--judge shorter:few: give a number of letters"),
        ("shorter:0", "--judge shorter:0: the kind 'shorter' reads 'colour', which is no option of evaluations"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_before_any_work(text, message, places):
    with pytest.raises(InvalidOption, match=message):
        make_judge(text.format(**places), OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reference:rougeL", "the data: has no wanted answers, which --judge reference:rougeL compares with"),
        ("reward:{functions}:graded", "--judge reward:.*graded takes 'answer', and the data have no such column; .* have: id"),
        ("reward:file:{scores}", "d:0: .*scores.jsonl has no score of any completion of this prompt: 'other'"),
    ],
)
def test_data_that_cannot_be_judged_are_refused_before_any_work(text, message, places):
    asked = SimpleNamespace(prompts=["other"], references=[None], columns=[{"id": 1}], sources=["d:0"])
    with pytest.raises((DataError, InvalidOption), match=message):
        make_judge(text.format(**places), OPTIONS).check(asked, "the data")


def test_todays_spellings_mean_what_they_did(places):
    for text, kind, argument in [
        ("http://h/v1#m", "endpoint", "http://h/v1#m"),
        ("https://h", "endpoint", "https://h"),
        *((metric, "reference", metric) for metric in METRICS),
        (f"{places['task']}/reward", "reward", f"model:{places['task']}/reward"),
        ("org/reward", "reward", "model:org/reward"),
    ]:
        found, rest = parse_judge(text)
        assert (found.name, rest) == (kind, argument)
        assert make_judge(text, OPTIONS).name == make_judge(f"{kind}:{argument}", OPTIONS).name


def test_help_lists_every_kind_that_is_installed(capsys):
    assert sorted(JUDGES) == ["endpoint", "reference", "reward", "shorter"]
    assert "shorter: N, the shorter answer wins" in judge_help()
    shown = " ".join(called(capsys, "eval", "--help")[1].split())
    for kind in JUDGES.values():
        assert kind.help.split(",")[0] in shown


def test_another_packages_judge_and_reward_work_in_the_command_and_in_its_dry_run(places, capsys, tmp_path):
    task = places["task"]
    words = ["eval", "--proposal", f"{task}/proposal", "--aligner", f"{task}/start", "--dataset", f"{task}/prompts.jsonl"]
    words += ["--judge", "shorter:40", "--judge", "reward:letter:x", "--max_tokens", "6", "--out", tmp_path / "out"]
    status, out, _ = called(capsys, *words, "--dry_run", "--json")
    told = json.loads(out)
    assert (status, told["judges"], told["most_questions"]) == (0, ["shorter:40", "reward:letter:x"], {})
    assert called(capsys, *words)[0] == 0
    results = read(tmp_path / "out" / "results.json")
    assert [(row["judge"], row["kind"], row["pair"]) for row in results["judging"]][:3] == [
        ("shorter-40", "shorter", "main"),
        ("shorter-40", "shorter", "null"),
        ("shorter-40", "shorter", "references"),
    ]
    assert results["provenance"]["judges"] == {
        "shorter-40": {"most": 40},
        "letter-x": {"fingerprint": "letter 1.0 x"},
    }
    status, _, errors = called(capsys, *words, "--criterion", "harmless")
    assert (status, "--criterion needs a --judge that is an endpoint" in errors[0]) == (2, True)


def test_a_run_of_an_earlier_version_is_found_again_by_the_new_spelling(places, capsys, tmp_path):
    """Both spellings have the same keys in the journal, and the same files of results."""
    task = places["task"]
    words = ["eval", "--system", "references", "--baseline", f"{task}/given.jsonl", "--dataset", f"{task}/prompts.jsonl"]
    rows = [json.loads(line) for line in (Path(task) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(Path(task) / "given.jsonl", [{"prompt": row["prompt"], "completion": "xya"} for row in rows])
    words += ["--out", tmp_path / "out"]
    old = ["--judge", f"{places['url']}#judge", "--judge", "chrf", "--judge", f"{task}/reward"]
    new = ["--judge", f"endpoint:{places['url']}#judge", "--judge", "reference:chrf", "--judge", f"reward:model:{task}/reward"]
    assert called(capsys, *words, *old)[0] == 0
    kept = (tmp_path / "out" / "judgements.jsonl").read_bytes()
    files = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    first = read(tmp_path / "out" / "results.json")["judging"]
    assert called(capsys, *words, *new)[0] == 0
    assert (tmp_path / "out" / "judgements.jsonl").read_bytes() == kept
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == files
    assert read(tmp_path / "out" / "results.json")["judging"] == first
