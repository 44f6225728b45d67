"""What holds for every reward, ours and another package's; and what TRL's functions are given, and may give."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval_task import called, make_eval_task
from rewards_of import package, write_functions, write_scores
from tiny_task import write_rows
from trimtab import AlignedModel
from trimtab.errors import DataError, InvalidOption, ModelError
from trimtab.judges.rewards.base import Reward
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.judges.rewards.file import FileReward
from trimtab.judges.rewards.function import FunctionReward
from trimtab.judges.rewards.kinds import REWARDS, make_reward, parse_reward, reward_help
from trimtab.judges.rewards.model import ModelReward

PROMPTS, ANSWERS = ["pa", "pb", "pc"], ["xyz", "ab", "xx"]
COLUMNS = [{"answer": "xyz"}, {"answer": "b"}, {"answer": "xx"}]
ASKED = SimpleNamespace(prompts=PROMPTS, references=[None] * 3, columns=COLUMNS, sources=["d:0", "d:1", "d:2"])
OPTIONS = {"dtype": "float32", "device": "cpu"}
EXPECTED = {
    "{functions}:wordy": [3, 2, 2],
    "function:{functions}:slow": [1.5, 1, 1],
    "{functions}:picky": [1, 0, 2],
    "{functions}:graded": [1, 0, 1],
    "file:{scores}": [3, 0, 2],
    "letter:x": [1, 0, 2],
    "model:{task}/reward": None,
    "contrast:good_model={task}/proposal,bad_model={task}/start": None,
}
"""Texts, and what they give `ANSWERS`; None for what the models themselves say."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    task = make_eval_task(folder / "task")
    scores = write_scores(folder, PROMPTS, ANSWERS)
    return {"task": str(task), "functions": str(write_functions(folder)), "scores": str(scores)}


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    with package(tmp_path / "package", monkeypatch):
        yield


@pytest.fixture(params=EXPECTED)
def spec(request, places):
    return request.param.format(**places), EXPECTED[request.param]


def ready(text):
    reward = make_reward(text, OPTIONS)
    reward.check(ASKED)
    reward.load(ASKED, "2026-11-30")
    return reward


def test_a_reward_is_made_without_loading_and_scores_each_answer(spec, places, monkeypatch):
    text, expected = spec
    with monkeypatch.context() as patch:
        for kind in (RewardModel, AlignedModel):
            patch.setattr(kind, "from_pretrained", None)
        assert isinstance(make_reward(text, OPTIONS), Reward)
    reward = ready(text)
    if expected is None:
        expected = said_by_models(text, places["task"])
    assert reward.score(PROMPTS, ANSWERS, COLUMNS) == pytest.approx(expected)
    assert reward.score([], [], []) == []
    assert reward.name
    assert reward.called == text


def said_by_models(text, task):
    """The scores of the classifier, or of the two models of the contrast by the defaults' arithmetic."""
    if text.startswith("model:"):
        return RewardModel.from_pretrained(f"{task}/reward").score(PROMPTS, ANSWERS)
    good, bad = (AlignedModel.from_pretrained(f"{task}/{name}").score(PROMPTS, ANSWERS) for name in ("proposal", "start"))
    pairs = [zip(one.proposal, other.proposal, strict=True) for one, other in zip(good, bad, strict=True)]
    squashed = [[math.tanh(g - b) for g, b in pair] for pair in pairs]
    return [sum(value for value in values if abs(value) >= 0.1) for values in squashed]


def test_what_tells_a_reward_from_others_is_stable_and_json(spec):
    one, other = ready(spec[0]), ready(spec[0])
    assert one.fingerprint == other.fingerprint
    assert one.label() == other.label()
    assert json.loads(json.dumps(one.identity())) == one.identity() == other.identity()
    assert json.loads(json.dumps(one.describe())) == one.describe()


def test_no_two_rewards_are_taken_for_one(places):
    known = [ready(text.format(**places)).fingerprint for text in EXPECTED]
    assert len(set(known)) == len(known)


def test_help_lists_every_kind_that_is_installed(capsys):
    assert sorted(REWARDS) == ["contrast", "file", "function", "judge", "letter", "model"]
    assert "letter: L, how often the letter L is there" in reward_help()
    assert "how often the letter L is there" in " ".join(called(capsys, "propose", "--help")[1].split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/model", "'org/model' is no reward: give MODULE.py:FUNCTION, or KIND:ARGUMENT with a kind of contrast, file"),
        ("modle:x", "did you mean model"),
        ("model:", "'model' needs an argument: model:"),
        ("nowhere.py:f", "there is no file 'nowhere.py' with a reward function"),
        ("no.such.module:f", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("function:f", "'f' is no function: give MODULE.py:FUNCTION"),
        ("{functions}:nobody", "has no function 'nobody'"),
        ("{functions}:nothing", "has no function 'nothing'"),
        ("{functions}:trained", "needs 'trainer_state', which only a trainer has"),
        ("file:nowhere.jsonl", "there is no file of scores"),
        ("letter:ab", "letter:ab: give one letter"),
    ],
)
def test_what_is_no_reward_is_refused(text, message, places):
    with pytest.raises(InvalidOption, match=message):
        make_reward(text.format(**places), OPTIONS)


# ---- functions


def scored(function, prompts, answers, columns=None):
    return FunctionReward(function, fingerprint="f").score(prompts, answers, columns or [{}] * len(prompts))


def test_a_function_gets_what_trl_gives_it():
    """Texts are texts; of chats, prompts are the messages and completions lists with the assistant's; columns are lists."""
    seen = []

    def f(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [1] * len(prompts)

    chat = [{"role": "user", "content": "hi"}]
    tools = {"messages": chat, "tools": [{"name": "look"}]}
    rows = [{"answer": 1}, {"answer": 2, "id": "b"}, {}]
    assert scored(f, ["a", chat, tools], ["x", "y", "z"], rows) == [1.0, 1.0, 1.0]
    assert seen == [
        (
            ["a", chat, chat],
            ["x", [{"role": "assistant", "content": "y"}], [{"role": "assistant", "content": "z"}]],
            {"answer": [1, 2, None], "id": [None, "b", None]},
        )
    ]


def test_a_function_gets_only_what_it_takes():
    def f(completions, answer, log_extra=None, other=7):
        assert (log_extra, other) == (None, 7)
        return [len(c) + a for c, a in zip(completions, answer, strict=True)]

    assert scored(f, ["a"], ["xy"], [{"answer": 3, "id": 9}]) == [5.0]
    assert FunctionReward(f, fingerprint="f").reads_columns
    assert not FunctionReward(lambda completions: [0] * len(completions), fingerprint="f").reads_columns


def test_numbers_of_other_libraries_are_numbers():
    import torch

    assert scored(lambda completions: torch.tensor([1.5, 2.0]), ["a", "b"], ["x", "y"]) == [1.5, 2.0]
    assert scored(lambda completions: [torch.tensor(1.5), None, True], ["a"] * 3, ["x"] * 3) == [1.5, None, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "raised KeyError: 'answer' (line 33 of rewards.py)"),
        ("short", "must give a list of 1 score, one for each completion, not 0 scores"),
        ("nan", "gave nan, but a score is a finite number, or None"),
        ("words", "gave 'good', but a score is a finite number, or None"),
    ],
)
def test_a_function_that_fails_or_gives_no_scores_is_named_with_what_it_was_asked(name, message, places):
    reward = ready(f"{places['functions']}:{name}")
    with pytest.raises(ModelError) as caught:
        reward.score(PROMPTS, ANSWERS, COLUMNS)
    assert str(caught.value) == f"{places['functions']}:{name}, for the completion 'xyz' of the prompt 'pa' (d:0): {message}"


def raises_for_ab(completions):
    if "ab" in completions:
        raise KeyError("ab")
    return [float(len(completion)) for completion in completions]


def test_which_completion_a_function_raises_for_is_found_by_asking_for_each_alone():
    with pytest.raises(ModelError, match="for the completion 'ab' of the prompt 'pb': raised KeyError: 'ab'") as caught:
        scored(raises_for_ab, PROMPTS, ANSWERS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_where_a_function_fails_for_several_and_for_none_alone_that_is_said():
    def crowded(completions):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    message = r"for 3 completions together: raised ValueError: too many \(.*\); for each of them alone it did not fail"
    with pytest.raises(ModelError, match=message):
        scored(crowded, PROMPTS, ANSWERS)
    reward = FunctionReward(crowded, fingerprint="f", on_error="none")
    assert reward.score(PROMPTS, ANSWERS, [{}] * 3) == [1.0, 1.0, 1.0]
    assert reward.failures.count == 1


def test_a_completion_that_a_function_fails_for_may_have_no_score_and_is_counted():
    reward = FunctionReward(raises_for_ab, fingerprint="f", on_error="none")
    assert reward.score(PROMPTS, ANSWERS, [{}] * 3) == [3.0, None, 2.0]
    assert reward.score(PROMPTS, ANSWERS, [{}] * 3) == [3.0, None, 2.0]
    assert reward.failures.count == 2
    assert "for the completion 'ab' of the prompt 'pb': raised KeyError: 'ab'" in reward.failures.first
    reward = FunctionReward(lambda completions: [1.0, float("inf"), 10**400], fingerprint="f", on_error="none")
    assert reward.score(PROMPTS, ANSWERS, [{}] * 3) == [1.0, None, None]
    with pytest.raises(InvalidOption, match="on_error must be one of stop, none, not 'skip'"):
        FunctionReward(raises_for_ab, on_error="skip")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("p" * 90, "'" + "p" * 80 + "'…"),
        ([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "'hi'"),
        ({"messages": [{"role": "assistant", "content": "ho"}], "tools": []}, "'ho'"),
    ],
)
def test_messages_have_the_beginning_of_what_was_asked_last(prompt, said):
    with pytest.raises(ModelError) as caught:
        scored(lambda completions: 1 / 0, [prompt], ["x" * 81])
    assert f"for the completion '{'x' * 80}'… of the prompt {said}: raised ZeroDivisionError" in str(caught.value)


def test_the_fingerprint_of_a_function_is_its_file_and_its_name(tmp_path):
    (tmp_path / "r.py").write_text("def f(completions):\n    return [0] * len(completions)\n\n\ng = f\n", encoding="utf-8")
    f, g = (make_reward(f"{tmp_path}/r.py:{name}", {}) for name in "fg")
    assert f.fingerprint != g.fingerprint
    (tmp_path / "r.py").write_text("def f(completions):\n    return [1] * len(completions)\n", encoding="utf-8")
    changed = make_reward(f"{tmp_path}/r.py:f", {})
    assert changed.fingerprint != f.fingerprint
    assert changed.score(["a"], ["b"], [{}]) == [1.0]


def test_a_function_whose_source_cannot_be_read_needs_a_fingerprint():
    partial = functools.partial(lambda completions, k: [k] * len(completions), k=3)
    with pytest.raises(InvalidOption, match=r"give trimtab\.judges\.rewards\.function\.FunctionReward"):
        FunctionReward(partial)
    assert scored(partial, ["a"], ["b"]) == [3.0]
    assert FunctionReward(write_functions).name == "write_functions"


def test_a_module_may_have_dataclasses(tmp_path):
    source = (
        "from __future__ import annotations\nimport dataclasses\n\n\n@dataclasses.dataclass\nclass One:\n    x: int = 2\n\n\n"
    )
    (tmp_path / "r.py").write_text(
        source + "def f(completions):\n    return [One().x for _ in completions]\n", encoding="utf-8"
    )
    reward = make_reward(f"{tmp_path}/r.py:f", {})
    assert (reward.name, reward.score(["a"], ["b"], [{}])) == ("r.f", [2.0])


def test_a_module_finds_what_lies_beside_it_and_a_package_what_is_here(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("SCORE = 4\n", encoding="utf-8")
    source = "import beside\n\n\ndef f(completions):\n    return [beside.SCORE] * len(completions)\n"
    (tmp_path / "pack").mkdir()
    (tmp_path / "r.py").write_text(source, encoding="utf-8")
    (tmp_path / "pack" / "mine.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert make_reward(f"{tmp_path}/r.py:f", {}).score(["a"], ["b"], [{}]) == [4.0]
    assert make_reward("pack.mine:f", {}).score(["a"], ["b"], [{}]) == [4.0]
    assert parse_reward("pack.mine:f")[0].name == "function"


# ---- files


def test_chats_with_tools_and_answers_in_messages_are_found_in_a_file(tmp_path):
    chat, answer = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "x"}]
    tools = [{"name": "look"}]
    rows = [
        {"prompt": chat, "completion": answer, "score": 1},
        {"prompt": chat, "completion": "x", "tools": json.dumps(tools), "score": 2},
        {"prompt": chat, "completion": "y", "score": None},
    ]
    write_rows(tmp_path / "s.jsonl", rows)
    reward = FileReward(tmp_path / "s.jsonl")
    with_tools = {"messages": chat, "tools": tools}
    assert reward.score([chat, with_tools, chat], ["x", "x", "y"], [{}] * 3) == [1.0, 2.0, None]
    with pytest.raises(DataError, match=r"s\.jsonl has no score of the completion 'z' of the prompt '"):
        reward.score([chat], ["z"], [{}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "s.jsonl:1: 'score' is missing; it has: prompt, completion"),
        ([{"prompt": "a", "completion": "b", "score": "3"}], "s.jsonl:1: 'score' must be a finite number, or null"),
        ([{"prompt": "a", "completion": "b", "score": float("nan")}], "'score' must be a finite number"),
        ([{"prompt": "a", "completion": 3, "score": 3}], "'completion' must be a text or a list of messages, not int"),
        ([{"prompt": "a", "completion": None, "score": 3}], "'completion' must be a text or messages, not None"),
        (
            [{"prompt": "a", "completion": "b", "score": 1}, {"prompt": "a", "completion": "b", "score": 2}],
            "s.jsonl:2: the same prompt and completion have another score above",
        ),
    ],
)
def test_a_file_that_is_none_of_scores_is_refused(rows, message, tmp_path):
    write_rows(tmp_path / "s.jsonl", rows)
    with pytest.raises(DataError, match=message):
        FileReward(tmp_path / "s.jsonl")


# ---- in the command


def test_every_reward_makes_pairs_in_the_command(spec, places, capsys, tmp_path):
    text, _ = spec
    lines = (Path(places["task"]) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    rows = [json.loads(line) | {"answer": "xx"} for line in lines]
    write_rows(tmp_path / "d.jsonl", rows)
    words = ["propose", "--proposal", f"{places['task']}/proposal", "--dataset", tmp_path / "d.jsonl", "--max_tokens", 4]
    words += ["--n", 4, "--seed", 3]
    assert called(capsys, *words, "--out", tmp_path / "all.jsonl")[0] == 0
    drawn = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row.get("completion", row.get("rejected")) for row in drawn]
    if text.startswith("file:"):
        text = f"file:{write_scores(tmp_path, [row['prompt'] for row in rows], sorted({*texts}))}"
    assert called(capsys, *words, "--out", tmp_path / "pairs.jsonl", "--reward", text)[0] == 0
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    reward = make_reward(text, OPTIONS)
    reward.load(SimpleNamespace(prompts=[row["prompt"] for row in rows], sources=["d"] * 3), "2026-11-30")
    for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        mine = texts[4 * i : 4 * i + 4]
        scores = reward.score([row["prompt"]] * 4, mine, [{"answer": "xx"}] * 4)
        worth = {text: score for text, score in zip(mine, scores, strict=True) if score is not None}
        assert worth[pair["chosen"]] == pytest.approx(max(worth.values()))
        assert worth[pair["rejected"]] == pytest.approx(min(worth.values()))


def test_a_run_with_another_reward_is_refused_and_one_without_scores_says_so(places, capsys, tmp_path, monkeypatch):
    words = ["propose", "--proposal", f"{places['task']}/proposal", "--dataset", f"{places['task']}/prompts.jsonl"]
    words += ["--max_tokens", 4, "--n", 2, "--max_num_seqs", 2, "--out", tmp_path / "o.jsonl"]
    score, calls = FunctionReward.score, []

    def killed(self, *asked):
        calls.append(asked)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(FunctionReward, "score", killed)
        assert called(capsys, *words, "--reward", f"{places['functions']}:wordy")[0] == 130
    status, _, errors = called(capsys, *words, "--reward", f"{places['functions']}:slow")
    assert (status, "left from a run with other ranking" in errors[0]) == (2, True)
    assert called(capsys, *words, "--reward", f"{places['functions']}:wordy")[0] == 0
    (tmp_path / "none.py").write_text("def f(completions):\n    return [None] * len(completions)\n", encoding="utf-8")
    status, out, _ = called(capsys, *words, "--reward", f"{tmp_path}/none.py:f", "--json")
    assert (status, json.loads(out)["failed"]) == (1, 12)
    row = json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["error"] == f"--reward {tmp_path}/none.py:f gives no score to enough samples"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reward", "{functions}:wordy", "--reward_model", "m"), "--reward_model is --reward model:RM, and there is another"),
        (("--reward", "{functions}:nobody"), "--reward: {functions} has no function 'nobody'"),
        (("--reward", "what"), "--reward: 'what' is no reward"),
        (("--reward", "{functions}:wordy", "--pairs", "2"), "--pairs must be from 1 to half of --n"),
        (("--reward", "{functions}:wordy", "--temperature", "0"), "--reward needs samples that differ"),
        (("--reward", "{functions}:graded"), "--reward {functions}:graded takes 'answer', and the data have no such column"),
    ],
)
def test_rewards_that_cannot_be_are_refused_before_anything_is_loaded(words, message, places, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.decode.aligned.AlignedModel.from_pretrained", None)
    said = [word.format(**places) for word in words]
    base = ["propose", "--proposal", "p", "--dataset", f"{places['task']}/prompts.jsonl", "--out", tmp_path / "o", "--n", 2]
    status, _, errors = called(capsys, *base, *said)
    assert status == 2
    assert message.format(**places) in errors[0]


def test_a_loaded_reward_model_is_a_reward(places):
    model = RewardModel.from_pretrained(f"{places['task']}/reward")
    reward = ModelReward(model, "mine")
    assert (reward.name, reward.fingerprint) == ("mine", model.fingerprint)
    assert reward.score(PROMPTS, ANSWERS, COLUMNS) == model.score(PROMPTS, ANSWERS)
    with pytest.raises(RuntimeError, match="not loaded yet"):
        ModelReward("folder").score(["a"], ["b"], [{}])
