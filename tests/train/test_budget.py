"""`max_kl`: the tuned weight keeps to it, and so does the comparison of checkpoints."""

import json

import pytest

from tiny_task import make_task, task_options, task_plan, task_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.core.logprobs import kl_divergence
from trimtab.decode.scoring import completion_rows
from trimtab.errors import InvalidOption
from trimtab.train.run import run_training as train

BUDGET = 0.1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, and the reports of runs without and with a budget that binds."""
    task = make_task(tmp_path_factory.mktemp("task"))
    said = {"eval_dataset": str(task / "held_out.jsonl"), "contrast": 0.5, "proposal_temperature": 1.0}
    return task, train(task_options(task, "free", **said)), train(task_options(task, "bound", max_kl=BUDGET, **said))


def kl(task, name, weight):
    """KL(aligned‖proposal) on the development answers, over the whole vocabulary, written out."""
    model = AlignedModel.from_pretrained(task / "proposal", task / name, weight=weight)
    rows = task_rows(64)[48:]
    pairs = [pair[:2] for pair in model.encode_pairs([r["prompt"] for r in rows], [r["chosen"] for r in rows])]
    manifest = json.loads((task / name / "trimtab.json").read_text())
    total, count = 0.0, 0
    for prompt, answer in pairs:
        ((logp, logq), _, _), *_ = completion_rows([model.proposal, *model.aligners], [(prompt, answer)])
        logq = (logq / manifest["aligner_temperature"]).log_softmax(-1)
        aligned = (logp + weight * logq).log_softmax(-1)
        total, count = total + float(kl_divergence(aligned, logp).sum()), count + len(answer)
    return total / count


def test_the_tuned_weight_keeps_to_the_budget(runs):
    task, free, bound = runs
    assert free["kl"] > BUDGET
    assert 0 < bound["weight"] < free["weight"]
    assert bound["kl"] <= BUDGET
    assert json.loads((task / "bound" / "trimtab.json").read_text())["weight"] == bound["weight"]
    assert bound["kl"] == pytest.approx(kl(task, "bound", bound["weight"]), abs=1e-4)
    assert kl(task, "bound", bound["weight"] + 2 / 128) > BUDGET


def test_checkpoints_are_compared_at_weights_within_the_budget(runs):
    """Each look's figures, its loss among them, are at the weight that it names; so a checkpoint that moves too far loses."""
    task, free, bound = runs
    looks = [row for row in bound["history"] if "eval_loss" in row]
    assert all(row["eval_kl_aligned_proposal"] <= BUDGET for row in looks)
    assert min(row["eval_weight"] for row in looks) < 1
    assert not any("eval_weight" in row for row in free["history"])
    best = min(looks[:-1], key=lambda row: row["eval_loss"])
    assert bound["metrics"]["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-5)
    assert bound["metrics"]["eval_weight"] == bound["weight"]
    rows = task_rows(64)[48:]
    model = AlignedModel.from_pretrained(task / "proposal", task / "bound")
    scores = model.score([r["prompt"] for r in rows], [r["chosen"] for r in rows], SamplingParams(weight=bound["weight"]))
    nll = -sum(sum(one.aligned) for one in scores) / sum(len(one.aligned) for one in scores)
    assert bound["metrics"]["eval_nll_aligned"] == pytest.approx(nll, abs=1e-4)


def test_a_budget_that_is_wide_changes_nothing(runs):
    task, free, _ = runs
    said = {"eval_dataset": str(task / "held_out.jsonl"), "contrast": 0.5, "proposal_temperature": 1.0}
    wide = train(task_options(task, "wide", max_kl=100.0, **said))
    assert (wide["weight"], wide["weights_tried"], wide["kl"]) == (free["weight"], free["weights_tried"], free["kl"])
    assert {row["eval_weight"] for row in wide["history"] if "eval_loss" in row} == {1.0}


def test_rules_without_a_weight_to_tune_have_no_budget(tmp_path):
    with pytest.raises(InvalidOption, match="max_kl bounds the weight that is tuned, and 'nucleus' has none: leave it out"):
        task_plan(tmp_path, "out", objective="sft", rule="nucleus", max_kl=0.1)
    with pytest.raises(InvalidOption, match=r"max_kl must be above 0, not 0\.0"):
        task_options(tmp_path, "out", max_kl=0.0)
