"""`trimtab.propose(...)`: the file that the command writes, from options, settings, loaded models and functions."""

import inspect
import json

import pytest

import trimtab
from eval_task import called, make_eval_task
from trimtab import AlignedModel, ProposeOptions
from trimtab.errors import InvalidOption
from trimtab.judges.rewards.base import Reward
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.judges.rewards.model import ModelReward


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_eval_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def model(task):
    return AlignedModel.from_pretrained(task / "proposal", [task / "start"])


def shared(task, **more):
    return {"dataset": str(task / "prompts.jsonl"), "max_tokens": 5, "seed": 3, "n": 4, **more}


def commanded(task, capsys, out, *more):
    words = ["propose", "--proposal", task / "proposal", "--aligner", task / "start", "--dataset", task / "prompts.jsonl"]
    status, said, _ = called(capsys, *words, "--max_tokens", 5, "--seed", 3, "--n", 4, "--out", out, "--json", *more)
    assert status == 0
    return json.loads(said), out.read_bytes()


def wordy(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def lettered(completions, answer):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def test_samples_are_the_commands_whichever_way_they_are_asked_for(task, model, capsys, tmp_path):
    report, expected = commanded(task, capsys, tmp_path / "command.jsonl")
    named = {"proposal": str(task / "proposal"), "aligner": [str(task / "start")]}
    outs = [str(tmp_path / f"{i}.jsonl") for i in range(4)]
    assert trimtab.propose(**shared(task, out=outs[0]), **named) == report | {"out": outs[0]}
    options = ProposeOptions(**shared(task, out=outs[1]), proposal=named["proposal"], aligner=tuple(named["aligner"]))
    trimtab.propose(options)
    trimtab.propose(options, out=outs[2])
    trimtab.propose(model=model, **shared(task, out=outs[3]))
    for out in outs:
        with open(out, "rb") as stream:
            assert stream.read() == expected


def test_a_reward_may_be_a_model_of_the_commands_a_loaded_one_or_a_function(task, model, capsys, tmp_path):
    _, expected = commanded(task, capsys, tmp_path / "command.jsonl", "--reward_model", task / "reward", "--pairs", 2)
    loaded = ModelReward(RewardModel.from_pretrained(task / "reward"))
    for i, reward in enumerate((f"model:{task}/reward", loaded)):
        report = trimtab.propose(model=model, reward=reward, pairs=2, **shared(task, out=str(tmp_path / f"{i}.jsonl")))
        assert (report["rows"], report["pairs"], report["failed"]) == (24, 2, 0)
        assert (tmp_path / f"{i}.jsonl").read_bytes() == expected
    trimtab.propose(model=model, reward=wordy, **shared(task, out=str(tmp_path / "f.jsonl")))
    for line in (tmp_path / "f.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert len(row["chosen"]) >= len(row["rejected"])


def test_a_dry_run_loads_and_writes_nothing(task, model, monkeypatch, tmp_path):
    monkeypatch.setattr(AlignedModel, "from_pretrained", None)
    out = str(tmp_path / "o.jsonl")
    told = trimtab.propose(proposal=str(task / "proposal"), reward=wordy, dry_run=True, **shared(task, out=out))
    assert (told["rows"], told["pairs"], told["reward"], told["most_tokens"]) == (12, 1, "wordy", 240)
    with pytest.raises(InvalidOption, match="takes 'answer', and the data have no such column"):
        trimtab.propose(proposal=str(task / "proposal"), reward=lettered, dry_run=True, **shared(task, out=out))
    told = trimtab.propose(model=model, dry_run=True, **shared(task, out=out))
    assert "proposal" not in told
    assert list(tmp_path.iterdir()) == []


class Anonymous(Reward):
    """It does not say what tells it from others."""

    name = "anonymous"

    def score(self, prompts, answers, columns):
        return [1.0] * len(answers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datset": "x"}, r"^there is no option 'datset': did you mean dataset\?$"),
        ({"dataset": ""}, r"^dataset is required$"),
        ({}, r"^proposal is required$"),
        ({"proposal": "p", "pairs": 2}, r"^pairs needs reward_model, or reward$"),
        (
            {"proposal": "p", "endpoint": "http://h/v1", "device": "cpu"},
            r"^device is for a model that runs here, not for endpoint$",
        ),
        ({"proposal": "p", "reward": wordy, "reward_model": "m"}, r"^reward_model is reward model:RM, and there is another"),
        ({"proposal": "p", "reward": 3}, r"^reward: must be a text, a function, or a trimtab\.judges\.rewards\.base\.Reward"),
        ({"proposal": "p", "reward": "what"}, r"^reward: 'what' is no reward: give MODULE\.py:FUNCTION"),
        ({"model": "loaded", "dtype": "float32"}, r"^dtype is for models that are loaded here, and model is loaded"),
        ({"model": "loaded", "endpoint": "http://h/v1"}, r"^endpoint names who samples, and so does model"),
        ({"model": 3}, r"^model must be a trimtab\.AlignedModel, not 3$"),
        ({"model": "loaded", "reward": ModelReward}, r"^reward: must be a text, a function, or a trimtab"),
        ({"model": "loaded", "reward": Anonymous()}, r"^reward: Anonymous needs a text 'fingerprint'"),
        ({"proposal": "p", "temperature": -1.0}, r"temperature must be a number at least 0"),
    ],
)
def test_what_cannot_be_is_refused_by_the_options_name(task, model, settings, message, tmp_path):
    asked = shared(task, out=str(tmp_path / "o.jsonl")) | settings
    if asked.get("model") == "loaded":
        asked["model"] = model
    with pytest.raises(InvalidOption, match=message):
        trimtab.propose(**asked)
    assert list(tmp_path.iterdir()) == []


def test_the_function_says_what_it_takes_and_the_modules_are_still_there():
    assert "Returns:" in inspect.getdoc(trimtab.propose.call.propose)
    assert list(inspect.signature(trimtab.propose).parameters) == ["options", "model", "settings"]
    assert issubclass(ModelReward, Reward)
