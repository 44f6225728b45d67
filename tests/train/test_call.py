"""`trimtab.train(...)`: the command from Python, with the command's checks and results."""

import inspect
import json

import pytest

import trimtab
from eval_task import called
from tiny_task import TRAINING, asked, make_task
from trimtab import TrainOptions
from trimtab.errors import InvalidOption


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def settings(task, name, **more):
    named = {"proposal": str(task / "proposal"), "aligner": str(task / "start"), "dataset": str(task / "train.jsonl")}
    return named | {"output_dir": str(task / name), "train_draft": False, "dev_samples": 0, "max_steps": 2} | QUICK | more


QUICK = {name: value for name, value in TRAINING.items() if name != "max_steps"}


def test_it_trains_what_the_command_trains(task, capsys):
    """The same weights and figures, with options of objectives and of `TrainingArguments` by name."""
    report = trimtab.train(**settings(task, "python", objective="ram", alpha=1e-3))
    words = [word for name, value in settings(task, "command").items() for word in (f"--{name}", str(value))]
    status, out, errors = called(capsys, "train", *words, "--objective", "ram", "--alpha", 1e-3, "--json")
    assert status == 0, errors
    there = json.loads(out)
    assert report["metrics"] | {"eval_runtime": 0} == there["metrics"] | {"eval_runtime": 0}
    assert report["objective"] == there["objective"] == {"name": "ram", "alpha": 1e-3}
    assert (task / "python" / "model.safetensors").read_bytes() == (task / "command" / "model.safetensors").read_bytes()
    assert report["output_dir"] == str(task / "python")
    assert report["history"]
    assert "history" not in there
    again = trimtab.train(**settings(task, "python", objective="ram", alpha=1e-3))
    assert again == report, "a finished run returns its report"


def test_options_are_taken_whole_and_settings_go_over_them(task):
    """A setting of an objective joins those that the options have."""
    options = asked(**settings(task, "whole"), contrast=0.5)
    assert isinstance(options, TrainOptions)
    told = trimtab.train(options, beta=0.2, dry_run=True, assume_tflops=1.0)
    assert told["dry_run"] is True
    assert told["contrast"] == 0.5
    assert not (task / "whole").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objectiv": "sft"}, "there is no option 'objectiv': did you mean objective?"),
        ({"learning_rat": 1.0}, "there is no option 'learning_rat': did you mean learning_rate?"),
        ({"alpha": 0.1}, "^alpha is for objective ram, and 'likelihood' has none: leave it out"),
        ({"objective": "dpo"}, "there is no objective 'dpo'|objective must be one of"),
        ({"lora_r": 4}, "^lora_r is for the adapters of use_peft"),
        ({"max_length": 1}, "^max_length must be at least 2, not 1"),
        ({"proposal": ""}, "^proposal is required"),
        ({"assume_tflops": 0.0, "dry_run": True}, "^assume_tflops must be above 0"),
        ({"expected_examples": 5}, "^expected_examples is for dry_run"),
        ({"label_names": ["x"]}, "there is no option 'label_names'"),
        ({"use_peft": "false"}, "^use_peft must be true or false, not 'false'"),
        ({"weight": "0.5"}, r"^weight must be from -1e\+06 to 1e\+06, not '0.5'"),
        ({"max_examples": 8.5}, "^max_examples must be an integer, not 8.5"),
        ({"objective": ["sft"]}, "^objective must be a text, not"),
        ({"alpha": -1.0, "objective": "ram"}, "^alpha must be at least 0, not -1.0"),
        ({"teacher_prompt": "t.txt", "rule": "geometric", "sft_weight": 0.1, "aligner": ""}, "^sft_weight: at weight 1"),
        ({"teacher_prompt": "t.txt", "rule": "nucleus"}, "teacher_prompt is learnt under product or geometric"),
    ],
)
def test_what_the_command_refuses_is_refused_without_dashes(task, more, message):
    with pytest.raises(InvalidOption, match=message):
        trimtab.train(**settings(task, "refused", **more))
    assert not (task / "refused").exists()


def test_what_is_no_options_is_refused():
    with pytest.raises(InvalidOption, match="options must be TrainOptions, not"):
        trimtab.train({"proposal": "p"})


def test_nothing_is_asked_by_none_or_by_zero_of_what_an_objective_lacks(task):
    """An interrupted run goes on whether its options are left out, None, or their own defaults."""
    one = trimtab.train(**settings(task, "none", objective="ram", alpha=None, contrast=0.0))
    assert one == trimtab.train(**settings(task, "none", objective="ram", contrast=0.0))


def test_it_is_a_package_too_and_shows_its_signature():
    import trimtab.train.rows

    assert trimtab.train.rows.__name__ == "trimtab.train.rows"
    assert list(inspect.signature(trimtab.train).parameters) == ["options", "settings"]
