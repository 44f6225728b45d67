"""A LoRA adapter that is trained on: a second round starts where the first one stopped, and its base stays frozen."""

import json
import shutil

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file

from tiny import save_lora
from tiny_task import make_task, task_options
from trimtab import AlignedModel
from trimtab.errors import InvalidOption
from trimtab.models.aligner import Aligner
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

SECOND = {"start": "pretrained", "contrast": 3.0, "beta": 1.0}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task, with the LoRA aligner of a first round in `first`."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    train(task_options(folder, "first", use_peft=True, lora_r=3, lora_dropout=0.0, contrast=0.0))
    return folder


def second(task, name, training=None, **settings):
    return task_options(task, name, training, **(SECOND | {"aligner": str(task / "first")} | settings))


def test_a_second_round_goes_on_from_the_adapter_at_its_settings(task):
    train(second(task, "second"))
    first, after = (Aligner.from_pretrained(task / name) for name in ("first", "second"))
    assert after.model.peft_config["default"].r == 3
    assert after.manifest.aligner_temperature == first.manifest.aligner_temperature != 1
    assert after.manifest.proposal_temperature == first.manifest.proposal_temperature
    base = Aligner.from_pretrained(task / "start").model.state_dict()
    held = after.model.get_base_model().state_dict()
    assert all(torch.equal(base[name], held[name.replace(".weight", ".base_layer.weight")]) for name in base if "proj" in name)
    before, trained = load_file(task / "first" / ADAPTER), load_file(task / "second" / ADAPTER)
    assert before.keys() == trained.keys()
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    score = AlignedModel.from_pretrained(task / "proposal", task / "second").score(["def"], ["xyz"])[0]
    assert score.aligned > score.proposal


def test_it_starts_where_the_first_round_stopped(task):
    """Without a step worth the name, development answers are as likely as under the first round at its tuned weight."""
    ended = train(second(task, "still", {"max_steps": 1, "learning_rate": 1e-12}))["metrics"]["eval_nll_aligned"]
    tried = json.loads((task / "first" / "training.json").read_text())["weights_tried"]
    assert ended == pytest.approx(min(nll for _, nll in tried), abs=1e-3)


def test_it_resumes_exactly(task, monkeypatch):
    train(second(task, "whole"))
    step = AlignerTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AlignerTrainer, "training_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(second(task, "broken"))
    monkeypatch.undo()
    train(second(task, "broken"))
    whole, resumed = (load_file(task / name / ADAPTER) for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_its_drafter_starts_from_the_base_and_goes_on_where_there_is_one(task):
    report = train(second(task, "bare", {"max_steps": 2}, train_draft=None))
    assert "draft" not in report
    report = train(second(task, "drafted", {"max_steps": 2}, train_draft=True))
    assert report["draft"]["metrics"]["eval_acceptance_on_answers"] > 0
    assert not (task / "drafted" / "draft" / ADAPTER).exists()
    AlignedModel.from_pretrained(task / "proposal", task / "drafted")
    third = second(task, "third", {"max_steps": 2}, aligner=str(task / "drafted"), train_draft=None)
    assert estimate(third, Expected(tflops=1.0))["draft_steps"] == 2
    assert "draft" in train(third)


def test_a_run_is_known_by_the_adapter_s_configuration(task, tmp_path):
    adapter = shutil.copytree(task / "first", tmp_path / "adapter")
    asked = second(task, "known", {"max_steps": 2}, aligner=str(adapter))
    train(asked)
    run = json.loads((task / "known" / "run.json").read_text())
    assert run["lora"]["r"] == 3
    assert "lora_r" not in run
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 320}))
    with pytest.raises(InvalidOption, match="holds a run with lora="):
        train(asked)


def test_a_base_that_is_named_from_here_is_found_from_anywhere(task, tmp_path, monkeypatch):
    adapter = shutil.copytree(task / "first", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "start"}))
    monkeypatch.chdir(task)
    train(second(task, "anywhere", {"max_steps": 2}, aligner=str(adapter)))
    monkeypatch.chdir(tmp_path)
    AlignedModel.from_pretrained(task / "proposal", task / "anywhere")


def test_a_dry_run_counts_the_adapter_and_its_base(task):
    report = estimate(second(task, "dry"), Expected(tflops=1.0))
    model = Aligner.from_pretrained(task / "first").model
    assert report["aligner"]["parameters"] == sum(p.numel() for p in model.parameters())
    adapter = sum(tensor.nbytes for tensor in load_file(task / "first" / ADAPTER).values())
    assert report["memory"]["gradients"] == adapter


@pytest.mark.parametrize("run", [train, lambda options: estimate(options, Expected(tflops=1.0))], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_r": 8}, "lora_r: '.*first' is an adapter, and keeps its own: leave it out"),
        ({"start": "uniform"}, "start 'uniform' retrains the output layer, and '.*first' is an adapter: choose another"),
    ],
)
def test_what_an_adapter_cannot_have_is_refused(task, run, settings, says):
    with pytest.raises(InvalidOption, match=says):
        run(second(task, "refused", **settings))


@pytest.mark.parametrize("run", [train, lambda options: estimate(options, Expected(tflops=1.0))], ids=["run", "dry run"])
def test_a_run_that_is_the_base_of_the_adapter_is_not_overwritten(task, run):
    train(task_options(task, "base", {"max_steps": 2}))
    train(task_options(task, "on_base", {"max_steps": 2}, aligner=str(task / "base"), use_peft=True))
    before = {path.name for path in (task / "base").iterdir()}
    onto = second(task, "base", aligner=str(task / "on_base"), overwrite_output_dir=True)
    with pytest.raises(InvalidOption, match=r"output_dir '.*base' holds the base of the adapter '.*on_base': "):
        run(onto)
    assert before <= {path.name for path in (task / "base").iterdir()}


@pytest.mark.parametrize("run", [train, lambda options: estimate(options, Expected(tflops=1.0))], ids=["run", "dry run"])
def test_adapters_of_other_kinds_are_refused(task, tmp_path, run):
    other = save_lora(tmp_path / "other", task / "start", r=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(task / "start" / name, other)
    IA3Config(base_model_name_or_path=str(task / "start"), task_type="CAUSAL_LM").save_pretrained(other)
    with pytest.raises(InvalidOption, match=r"is an adapter of type .*IA3; only LoRA can be trained on"):
        run(second(task, "refused", aligner=str(other)))
