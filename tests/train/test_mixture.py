"""Training for `mixture`: the optimum, the gradient, and runs from options to a manifest that is decoded as it was trained."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tiny_task import make_task, task_options, task_plan, task_rows
from trimtab import AlignedModel
from trimtab.cli import main
from trimtab.core.logprobs import log_normalize
from trimtab.core.objectives import likelihood
from trimtab.core.rules import Mixture
from trimtab.errors import InvalidOption
from trimtab.models.aligner import Manifest
from trimtab.models.table import TableLM
from trimtab.train.fused_likelihood import fused_likelihood
from trimtab.train.rows import compress
from trimtab.train.run import run_training as train

V = 6


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def test_likelihood_reaches_what_the_aligner_has_to_say():
    """Where the data's law is (1−w)·p̃ + w·r after every context, a free table becomes r: the loss is convex in q."""
    weight, contexts = 0.3, V + 1
    proposal, wanted = TableLM.random(V, seed=1).table, TableLM.random(V, seed=2).table
    chance = (0.7 * proposal.exp() + 0.3 * wanted.exp()).flatten()
    logp, tokens = proposal.repeat_interleave(V, 0), torch.arange(V).repeat(contexts)
    logits = torch.zeros(contexts, V, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=400, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = (chance * likelihood(Mixture(), logp, log_normalize(logits).repeat_interleave(V, 0), weight, tokens)).sum()
        total.backward()
        return total

    start = loss().item()
    optimiser.step(loss)
    least = -(chance * chance.view(contexts, V).log().flatten()).sum()
    assert 0 <= loss().item() - least.item() < 1e-6 < start - least.item()
    assert_close(log_normalize(logits.detach()).exp(), wanted.exp(), atol=3e-3, rtol=0)


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.8, 1.4), (1.0, 1.0)])
def test_the_gradient_is_that_of_finite_differences(weight, temperature):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    cached = compress(rows, torch.tensor([0, 3, 5, 1]), 2)
    logits = torch.randn(6, V + 2, generator=generator, dtype=torch.float64).requires_grad_()
    positions = torch.tensor([0, 1, 3, 5])
    loss = lambda x: fused_likelihood(Mixture(), cached, x, positions, weight, temperature, V)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)


def test_a_run_learns_what_is_decoded_and_tunes_the_share_exactly(task):
    """The figure of the end is what `score` says at the share that the manifest has, and no share beside it is better."""
    report = train(
        task_options(task, "mixed", {"max_steps": 40}, rule="mixture", weight=0.3, eval_dataset=str(task / "held_out.jsonl"))
    )
    losses = [row["eval_nll_aligned"] for row in report["history"] if "eval_nll_aligned" in row]
    assert losses[-1] < losses[0]
    assert report["metrics"]["eval_nll_aligned"] < report["metrics"]["eval_nll_proposal"] - 0.05
    manifest = json.loads((task / "mixed" / "trimtab.json").read_text())
    assert (manifest["rule"], manifest["objective"], manifest["weight"]) == ("mixture", "likelihood", report["weight"])
    assert not Manifest(**manifest).is_residual
    assert [weight for weight, _ in report["weights_tried"]] == sorted({0.0, report["weight"], 1.0})
    rows = task_rows(64)[48:]
    texts = [row["prompt"] for row in rows], [row["chosen"] for row in rows]

    def nll(**settings):
        model = AlignedModel.from_pretrained(task / "proposal", task / "mixed", **settings)
        each = [value for score in model.score(*texts) for value in score.aligned]
        return -math.fsum(each) / len(each)

    best = nll()
    assert dict(report["weights_tried"])[report["weight"]] == pytest.approx(best, abs=1e-5)
    assert report["metrics"]["eval_nll_aligned"] == pytest.approx(nll(weight=0.3), abs=1e-5)
    for beside in (-0.02, 0.02):
        assert nll(weight=min(1.0, report["weight"] + beside)) >= best - 1e-7


def test_one_number_of_the_proposal_a_token_is_enough(task):
    """Whatever the cache keeps beside it, the same weights are learnt, and the same share is best."""
    found = []
    for name, top_k in (("whole", 0), ("least", 1)):
        settings = {"rule": "mixture", "weight": 0.4, "cache_top_k": top_k}
        report = train(task_options(task, f"kept-{name}", {"max_steps": 6}, **settings))
        found.append((load_file(task / f"kept-{name}" / "model.safetensors"), report["weight"]))
    assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_the_share_stays_within_a_budget(task):
    report = train(task_options(task, "bounded", {"max_steps": 20}, rule="mixture", weight=0.5, max_kl=0.02))
    assert 0 < report["weight"] < 1
    assert 0.01 < report["kl"] <= 0.02


def train_line(task) -> list[str]:
    """The command up to where it writes."""
    models = ["--proposal", str(task / "proposal"), "--aligner", str(task / "start")]
    return ["train", *models, "--dataset", str(task / "train.jsonl")]


@pytest.mark.parametrize("weight", [1.2, -0.1])
def test_a_weight_that_is_no_share_is_refused_before_any_work(task, weight, capsys):
    with pytest.raises(InvalidOption, match=r"^weight"):
        task_plan(task, "none", rule="mixture", weight=weight)
    line = train_line(task)
    assert main([*line, "--output_dir", str(task / "none"), "--rule", "mixture", f"--weight={weight}"]) == 2
    assert "weight" in capsys.readouterr().err
    assert not (task / "none").exists()


def test_what_a_mixture_is_not_trained_by(task):
    plan = task_plan(task, "plan", rule="mixture")
    assert plan.weight == 0.5
    assert plan.objective.fits(plan.setting) == ("product", "geometric", "mixture")
    assert not plan.trains_draft
    for settings, message in (
        ({"teacher_prompt": "t.txt"}, "teacher_prompt is learnt under product or geometric"),
        ({"cache_tail_samples": 4, "cache_top_k": 4}, "draws can stand for the tail in product, not in 'mixture'"),
        ({"start": "tempered"}, "start 'tempered' fits the aligner's temperature"),
    ):
        with pytest.raises(InvalidOption, match=message):
            task_plan(task, "plan", rule="mixture", **settings)
    for rule in ("gate(rule=mixture)", "nudge"):
        with pytest.raises(InvalidOption, match="likelihood trains product, geometric or mixture"):
            task_plan(task, "plan", rule=rule)
        assert task_plan(task, "plan", rule=rule, objective="sft").rule.name in rule


def test_the_command_trains_it(task, capsys):
    line = train_line(task)
    line += [
        "--output_dir",
        str(task / "told"),
        "--rule",
        "mixture",
        "--weight",
        "0.3",
        "--max_steps",
        "2",
        "--report_to",
        "none",
    ]
    assert main([*line, "--use_cpu", "true", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 <= report["weight"] <= 1
    assert json.loads((task / "told" / "trimtab.json").read_text())["rule"] == "mixture"
