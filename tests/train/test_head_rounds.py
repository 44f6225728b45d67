"""A head that is trained on: a second round starts where the first one stopped, with the same layers and adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import asked, make_task, task_options
from trimtab import AlignedModel
from trimtab.cli import main
from trimtab.errors import CheckpointError, InvalidOption, UnsupportedModel
from trimtab.models.aligner import describe
from trimtab.train.arguments import training_arguments
from trimtab.train.plan import Facts, resolve
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

ADAPTER = "adapter_model.safetensors"
FIRST = {"aligner": "", "head_layers": 1, "lora_r": 3, "lora_alpha": 5, "contrast": 0.0, "keep_samples": 6}
STILL = {"max_steps": 1, "learning_rate": 1e-12}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task, with a head of a first round in `first`, which was trained at settings of its own."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    train(task_options(folder, "first", lora_dropout=0.0, weight=0.7, aligner_temperature=1.25, **FIRST))
    return folder


def second(task, name, training=None, **settings):
    said = {"aligner": str(task / "first"), "contrast": 0.0, "keep_samples": 6}
    return task_options(task, name, training, **(said | settings))


def scores(task, name):
    model = AlignedModel.from_pretrained(task / "proposal", task / name)
    return torch.tensor([value for one in model.score(["def", "kl"], ["xyz", "zab"]) for value in one.aligned])


def manifest(task, name):
    return json.loads((task / name / "trimtab.json").read_text(encoding="utf-8"))


def test_without_a_step_it_is_the_head_again(task):
    report = train(second(task, "still", STILL))
    before, after = (load_file(task / name / ADAPTER) for name in ("first", "still"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-9, rtol=0)
    torch.testing.assert_close(scores(task, "still"), scores(task, "first"), atol=1e-6, rtol=0)
    tried = dict(json.loads((task / "first" / "training.json").read_text())["weights_tried"])
    assert report["metrics"]["eval_nll_aligned"] == pytest.approx(min(tried.values()), abs=1e-4)


def test_it_may_have_a_drafter_of_its_own_whatever_the_first_had(task):
    """That of the first round is no start for it."""
    first = shutil.copytree(task / "first", task / "drafted")
    train(second(task, "drafting", STILL, train_draft=True))
    shutil.copytree(task / "drafting" / "draft", first / "draft")
    report = train(second(task, "again", STILL, train_draft=True, aligner=str(first)))
    assert report["draft"]["tokens"] > 0
    assert (task / "again" / "draft" / "trimtab_draft.json").exists()


def test_it_goes_on_at_the_settings_of_the_first(task):
    report = train(second(task, "second"))
    first, after = manifest(task, "first"), manifest(task, "second")
    assert (after["head"], after["rule"], after["aligner_temperature"]) == (first["head"], "geometric", 1.25)
    one, other = (json.loads((task / name / "adapter_config.json").read_text()) for name in ("first", "second"))
    assert one == other
    assert (one["r"], one["lora_alpha"], one["layers_to_transform"]) == (3, 5, [1])
    still = train(second(task, "still", STILL))["metrics"]
    assert report["metrics"]["eval_nll_aligned"] < still["eval_nll_aligned"]
    run = json.loads((task / "second" / "run.json").read_text())
    assert run["weight"] == first["weight"]
    assert run["aligner_weights"].startswith("sha256:")
    assert (run["lora"]["r"], run["head_layers"]) == (3, 1)
    assert "lora_r" not in run


def test_what_was_trained_is_what_is_decoded(task):
    rows = [json.loads(line) for line in (task / "held_out.jsonl").read_text().splitlines()]
    report = train(second(task, "decoded", eval_dataset=str(task / "held_out.jsonl")))
    for name in ("decoded", "first"):
        model = AlignedModel.from_pretrained(task / "proposal", task / name)
        found = model.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
        mean = -sum(sum(one.aligned) for one in found) / sum(len(one.tokens) for one in found)
        if name == "decoded":
            assert mean == pytest.approx(dict(report["weights_tried"])[report["weight"]], abs=1e-4)
            best = mean
    assert best < mean - 0.1


def test_its_defaults_are_those_of_heads_and_of_its_manifest(task, tmp_path):
    head = shutil.copytree(task / "first", tmp_path / "head")
    (head / "trimtab.json").write_text(json.dumps(manifest(task, "first") | {"weight": 0.5, "proposal_top_p": 0.9}))
    named = {"proposal": str(task / "proposal"), "aligner": str(head), "dataset": "d", "output_dir": "o"}
    plan = resolve(asked(**named), Facts(describe(head)))
    assert (str(plan.rule), plan.weight, plan.asked.proposal_top_p) == ("geometric", 0.5, 0.9)
    assert plan.temperatures == (1.0, 1.25)
    paired = resolve(asked(**named), Facts(describe(head), records=8))
    assert (plan.kept_samples, paired.objective.contrast, plan.asked.use_peft) == (64, 1.0, True)
    assert resolve(asked(**named, weight=1.0), Facts(describe(head))).weight == 1
    (head / "trimtab.json").write_text(json.dumps(manifest(task, "first") | {"weight": 0.0}))
    assert resolve(asked(**named), Facts(describe(head))).weight == 1  # at 0 nothing would be learnt
    arguments = training_arguments(plan)
    assert (arguments.learning_rate, arguments.num_train_epochs, arguments.eval_steps) == (1e-3, 1, 0.25)
    of_pairs = training_arguments(resolve(asked(**named, objective="preference"), Facts(describe(head))))
    assert (of_pairs.learning_rate, of_pairs.num_train_epochs, of_pairs.eval_steps) == (1e-4, 1, 0.25)


def test_samples_are_kept_by_the_same_rule(task):
    """The bare proposal says them again, whatever the head has learnt."""
    train(second(task, "second"))
    first, after = ((task / name / "kept_samples.jsonl").read_text() for name in ("first", "second"))
    assert first == after


def test_it_resumes_exactly(task, monkeypatch):
    train(second(task, "second"))
    step = AlignerTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise RuntimeError("killed")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignerTrainer, "training_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train(second(task, "broken"))
    train(second(task, "broken"))
    assert (task / "second" / ADAPTER).read_bytes() == (task / "broken" / ADAPTER).read_bytes()


def test_a_run_is_known_by_the_weights_that_it_began_with(task, tmp_path):
    head = shutil.copytree(task / "first", tmp_path / "head")
    asked = second(task, "known", STILL, aligner=str(head))
    train(asked)
    save_file({name: weight + 1 for name, weight in load_file(head / ADAPTER).items()}, head / ADAPTER)
    with pytest.raises(InvalidOption, match="holds a run with aligner_weights="):
        train(asked)


def test_an_adapter_of_some_layers_keeps_them(task, tmp_path):
    """A head of both layers, of which the adapter was cut to one: what is saved names the same one."""
    train(task_options(task, "deep", STILL, **(FIRST | {"head_layers": 2, "keep_samples": 0})))
    head = shutil.copytree(task / "deep", tmp_path / "head")
    weights = {name: weight for name, weight in load_file(head / ADAPTER).items() if ".layers.1." in name}
    save_file(weights, head / ADAPTER)
    config = json.loads((head / "adapter_config.json").read_text())
    (head / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": 1}))
    train(second(task, "of_some", STILL, aligner=str(head)))
    assert json.loads((task / "of_some" / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    assert load_file(task / "of_some" / ADAPTER).keys() == weights.keys()


def test_a_head_of_another_proposal_is_refused(task, tmp_path):
    save_tiny(tmp_path / "other", tiny_model("llama", 28, seed=9), tiny_tokenizer())
    with pytest.raises(UnsupportedModel, match="is a head of another proposal"):
        train(second(task, "refused", proposal=str(tmp_path / "other")))
    assert not (task / "refused" / "run.json").exists()


def test_weights_that_do_not_fill_the_head_are_refused(task, tmp_path):
    head = shutil.copytree(task / "first", tmp_path / "head")
    some = load_file(head / ADAPTER)
    some.popitem()
    save_file(some, head / ADAPTER)
    with pytest.raises(CheckpointError, match="does not fill the adapter: lacks 1 keys"):
        train(second(task, "refused", aligner=str(head)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"head_layers": 2}, "head_layers: '.*first' is a head of 1 layers, and keeps them"),
        ({"lora_r": 8}, "lora_r: '.*first' is an adapter, and keeps its own"),
        ({"start": "tempered"}, "start: a head is trained on as it is: leave out --start tempered"),
        ({"start": "uniform"}, "start: a head is trained on as it is: leave out --start uniform"),
        ({"rule": "product"}, "rule: a head starts as the proposal, and product would"),
        ({"sft_weight": 0.3}, "sft_weight: at weight 1"),
        ({"proposal_endpoint": ("http://h/v1",)}, "the aligner is a head, which reads .* an endpoint gives none"),
    ],
)
def test_what_a_second_round_refuses(task, settings, says):
    with pytest.raises(InvalidOption, match=says):
        train(second(task, "refused", **settings))


@pytest.mark.parametrize("name", ["head_layers", "keep_samples"])
def test_what_is_for_heads_is_refused_of_others(task, name):
    with pytest.raises(InvalidOption, match=f"{name} is for heads, and '.*start' is none"):
        train(task_options(task, "refused", **{name: 1}))


def test_the_command_trains_on(task, capsys):
    words = ["train", "--proposal", str(task / "proposal"), "--aligner", str(task / "first"), "--max_steps", "1"]
    words += ["--dataset", str(task / "train.jsonl"), "--output_dir", str(task / "cli"), "--report_to", "none"]
    words += ["--use_cpu", "true", "--max_length", "32", "--keep_samples", "4", "--start", "pretrained", "--beta", "1"]
    assert main([*words]) == 0, capsys.readouterr().err
    assert manifest(task, "cli")["head"] == manifest(task, "first")["head"]
