"""A residual's drafter: what it learns, that a kill changes nothing, and that the aligner's folder is complete without it."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from killing import kill_in_step
from tiny_task import V, make_task, task_options, task_plan, task_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.data.encoding import Encoder
from trimtab.errors import InvalidOption, VocabularyMismatch
from trimtab.models.aligner import Aligner
from trimtab.train import draft, run
from trimtab.train.draft import CHECKPOINTS, DraftTrainer
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.inputs import encode_parts, read_parts
from trimtab.train.run import run_training as train


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def trained(task):
    """A run with its drafter: its folder and its report."""
    return task / "whole", train(task_options(task, "whole", train_draft=True, proposal_temperature=1.3))


def test_the_drafter_comes_closer_to_the_aligned_model(task, trained):
    folder, report = trained
    seen = [row for row in report["draft"]["history"] if "eval_kl_aligned_draft" in row]
    assert seen[-1]["eval_kl_aligned_draft"] < seen[0]["eval_kl_aligned_draft"]
    assert json.loads((folder / "training.json").read_text())["draft"] == report["draft"]


def test_its_figures_are_those_of_the_loaded_models(task, trained):
    """By hand: rows of proposal, aligner and drafter on each development answer, from the folders."""
    folder, report = trained
    proposal, aligner, draft = (
        AlignedModel.from_pretrained(path, draft="none").proposal for path in (task / "proposal", folder, folder / "draft")
    )
    finished = Aligner.from_pretrained(folder)
    plan = task_plan(task, "whole")
    encoder = Encoder(finished.tokenizer, V, (0,))
    _, development = encode_parts(read_parts(plan, finished.tokenizer), plan, encoder, 64, 64)
    kept, kl = [], []
    for example in development:
        ids = torch.tensor([example.prompt + example.chosen])
        with torch.no_grad():
            logits = [lm.model(ids).logits[0, len(example.prompt) - 1 : -1, :V] for lm in (proposal, aligner, draft)]
        p, q, d = (row.log_softmax(-1) for row in logits)
        q = (q / finished.manifest.aligner_temperature).log_softmax(-1)
        target = ((p / 1.3).log_softmax(-1) + report["weight"] * q).log_softmax(-1)
        kept += torch.minimum(target.exp(), d.exp()).sum(-1).tolist()
        kl += (target.exp() * (target - d)).sum(-1).tolist()
    metrics = report["draft"]["metrics"]
    assert metrics["eval_acceptance_on_answers"] == pytest.approx(sum(kept) / len(kept), abs=1e-5)
    assert metrics["eval_kl_aligned_draft"] == pytest.approx(sum(kl) / len(kl), abs=1e-5)


def test_the_aligner_is_that_of_a_run_without_a_drafter_which_may_come_later(task, trained):
    folder, report = trained
    alone = train(task_options(task, "alone", proposal_temperature=1.3))
    assert "draft" not in alone
    assert not (task / "alone" / "draft").exists()
    assert (task / "alone" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    later = train(task_options(task, "alone", train_draft=True, proposal_temperature=1.3))
    assert later["draft"]["metrics"] == report["draft"]["metrics"]
    assert (task / "alone/draft/model.safetensors").read_bytes() == (folder / "draft/model.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["in a step", "before it is saved", "before it is reported"])
def test_a_killed_run_ends_with_the_same_drafter(task, trained, where, monkeypatch):
    folder, _ = trained
    name = where.replace(" ", "-")
    options = task_options(task, name, train_draft=True, proposal_temperature=1.3)
    write = run.write_json

    def dying(*args, **kwargs):
        raise RuntimeError("killed")

    if where == "in a step":
        kill_in_step(monkeypatch, DraftTrainer)
    elif where == "before it is saved":
        monkeypatch.setattr(draft, "save_model", dying)
    else:
        monkeypatch.setattr(run, "write_json", lambda path, value: dying() if "draft" in value else write(path, value))
    with pytest.raises(RuntimeError, match="killed"):
        train(options)
    monkeypatch.undo()
    AlignedModel.from_pretrained(task / "proposal", task / name)  # the aligner is whole already
    assert list((task / name / CHECKPOINTS).glob("checkpoint-*"))
    report = train(options)
    one, other = (load_file(path / "draft" / "model.safetensors") for path in (folder, task / name))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "draft" in report


def test_a_residual_is_drafted_for_by_its_drafter(task, trained):
    folder, _ = trained
    params = SamplingParams(n=4, seed=3, max_tokens=12)
    prompts = [row["prompt"] for row in task_rows(4)]
    texts = []
    for length in (0, 3):
        model = AlignedModel.from_pretrained(task / "proposal", folder, num_speculative_tokens=length)
        assert model.models.drafter.models
        texts.append([completion.tokens for completion in model.generate(prompts, params)])
    named = AlignedModel.from_pretrained(task / "proposal", folder, draft=folder / "draft", num_speculative_tokens=3)
    assert texts[0] == texts[1] == [completion.tokens for completion in named.generate(prompts, params)]
    held = Aligner.from_pretrained(folder)
    assert AlignedModel.from_pretrained(task / "proposal", held).models.drafter.models
    assert AlignedModel.from_pretrained(task / "proposal", folder, draft="none").drafter == "none"
    assert AlignedModel.from_pretrained(task / "proposal", folder, draft="aligner").drafter == "aligner"


def test_a_drafter_beside_what_does_not_say_how_it_was_trained_does_not_draft(task, trained, tmp_path):
    aligner = Aligner.from_pretrained(trained[0])
    aligner.manifest = None
    aligner.save_pretrained(tmp_path)
    assert (tmp_path / "draft" / "model.safetensors").exists()
    model = AlignedModel.from_pretrained(task / "proposal", tmp_path)
    assert not model.models.drafter.models
    assert model.drafter == "aligner"


def test_a_drafter_beside_a_residual_of_another_packages_objective_drafts(task, trained, tmp_path):
    """Where it is decoded, that package need not be installed."""
    aligner = Aligner.from_pretrained(trained[0])
    aligner.manifest = dataclasses.replace(aligner.manifest, objective="focal")
    aligner.save_pretrained(tmp_path)
    assert len(AlignedModel.from_pretrained(task / "proposal", tmp_path).models.drafter.models) == 1


def test_a_drafter_goes_with_its_aligner_and_no_other_takes_its_place(task, trained, tmp_path):
    aligner = Aligner.from_pretrained(trained[0])
    aligner.save_pretrained(tmp_path)
    weights = (tmp_path / "draft" / "model.safetensors").read_bytes()
    assert weights == (trained[0] / "draft" / "model.safetensors").read_bytes()
    again = Aligner.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert (tmp_path / "draft" / "model.safetensors").read_bytes() == weights
    again.draft = None
    again.save_pretrained(tmp_path)
    assert Aligner.from_pretrained(tmp_path).draft is None


def test_a_drafter_of_another_vocabulary_is_refused(task, trained, tmp_path):
    Aligner.from_pretrained(trained[0]).save_pretrained(tmp_path)
    other = Aligner.from_pretrained(trained[0]).tokenizer
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "draft")
    with pytest.raises(VocabularyMismatch, match="draft"):
        AlignedModel.from_pretrained(task / "proposal", tmp_path)


def test_only_a_residual_gets_a_drafter(task):
    default = {"train_draft": None}
    assert task_plan(task, "x", **default).trains_draft
    assert not task_plan(task, "x", **default, use_peft=True).trains_draft
    assert task_plan(task, "x", train_draft=True, use_peft=True).trains_draft
    assert not task_plan(task, "x", **default, rule="geometric").trains_draft
    assert not task_plan(task, "x", **default, objective="preference").trains_draft
    with pytest.raises(InvalidOption, match="train_draft: only a residual"):
        task_plan(task, "x", train_draft=True, rule="geometric")


def test_a_dry_run_counts_its_steps(task):
    known = Expected(tflops=1.0)
    assert estimate(task_options(task, "dry", train_draft=True), known)["draft_steps"] == 12
    assert estimate(task_options(task, "dry"), known)["draft_steps"] == 0
