"""A contrast on edits: what it rewards, what it leaves alone, and runs with it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from eval_task import called
from killing import kill_in_step
from tiny_task import V, make_task, task_options, task_plan, task_rows, write_rows
from trimtab.core.rules import parse_rule
from trimtab.data.examples import Example, answers
from trimtab.errors import InvalidOption
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, Item, collate
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.objectives import Batch, Likelihood, Logits, Preference, Rows, Setting
from trimtab.train.rows import CachedRows, ModelRows
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

APART = [Example([5, 6], [7, 8, 1], [9, 2]), Example([4], [11], [12, 13, 14, 15])]
"""Pairs with nothing in common."""
NEAR = [
    Example([5, 6], [7, 8, 9, 0], [7, 3, 9, 0]),  # one token is another
    Example([4], [7, 8, 0], [7, 8, 9, 10, 0]),  # two are gone
    Example([4, 4, 4], [2, 1, 3, 5, 6, 0], [1, 3, 5, 6, 0]),  # one came
]
MARKS = {"chosen": "-+-- --- +-----", "rejected": "-+-- --++- -----"}
PRODUCT, HEAD = Setting(parse_rule("product"), 0.7), Setting(parse_rule("geometric"), 1.0, head=True)
CASES = [(Preference, PRODUCT), (Preference, HEAD), (Likelihood, PRODUCT), (Likelihood, HEAD)]


def rows(count, seed):
    return 2 * torch.randn(count, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marked(which):
    return torch.tensor([mark == "+" for mark in MARKS[which].replace(" ", "")])


class Seen:
    """A batch of examples with random rows of both models, and the aligner's logits to take gradients of."""

    def __init__(self, examples, objective, setting, *, fused=False):
        self.inputs, self.fused, self.setting = collate([Item(e) for e in examples], objective.edits), fused, setting
        self.logits = {which: rows(len(self.tokens(which)) + 1, i).requires_grad_() for i, which in enumerate(MARKS)}
        self.logp = {which: rows(len(self.tokens(which)), i + 2).log_softmax(-1) for i, which in enumerate(MARKS)}
        for which in MARKS:
            cached = self.cached(which)
            self.inputs |= {f"{which}_proposal_{name}": getattr(cached, name) for name in CachedRows._fields}
        self.losses = objective.loss(Batch(self.inputs, setting, 2.5, self.token_losses, training=True))

    def tokens(self, which):
        return self.inputs[f"{which}_tokens"]

    def cached(self, which):
        return CachedRows.whole(self.logp[which], self.tokens(which))

    def token_losses(self, loss, which):
        tokens, logits = self.tokens(which), self.logits[which]
        if self.fused:
            places = torch.arange(len(tokens)) + 1
            return loss.of_logits(Logits(logits, places, tokens, V, self.setting, lambda: self.cached(which), None))
        return loss.of_rows(Rows(tokens, logits[1:].log_softmax(-1), self.logp[which], self.setting))

    def log_ratios(self, which):
        """log-probability of each token, decoded by `HEAD`, above the proposal's."""
        gains = (self.logits[which][1:].log_softmax(-1) - self.logp[which]).detach()
        return gains.gather(1, self.tokens(which)[:, None]).squeeze(1)

    def gradients(self):
        """Of the logits that predict each token, by the answer."""
        found = torch.autograd.grad(self.losses.sum(), list(self.logits.values()), allow_unused=True)
        return dict(zip(self.logits, found, strict=True))


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_pairs_with_nothing_in_common_have_the_loss_of_whole_answers(kind, setting):
    plain, edits = kind().settle(setting._replace(records=2)), kind(contrast_on="edits").settle(setting._replace(records=2))
    assert (plain.edits, edits.edits) == (None, 0)
    whole, some = Seen(APART, plain, setting), Seen(APART, edits, setting)
    assert torch.equal(whole.losses, some.losses)
    assert all(torch.equal(a, b) for a, b in zip(whole.gradients().values(), some.gradients().values(), strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["rows", "logits"])
@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_what_both_answers_have_is_not_contrasted(kind, setting, fused):
    """Exactly no gradient there; beside a likelihood of the chosen answer, exactly its own."""
    objective = kind(contrast_on="edits").settle(setting._replace(records=3))
    found = Seen(NEAR, objective, setting, fused=fused).gradients()
    alone = {which: torch.zeros_like(gradient) for which, gradient in found.items()}
    if kind is Likelihood:
        alone["chosen"] = Seen(NEAR, Likelihood(contrast=0.0).settle(setting), setting, fused=fused).gradients()["chosen"]
    for which in MARKS:
        of_tokens, expected = found[which][1:], alone[which][1:]
        assert torch.equal(of_tokens[~marked(which)], expected[~marked(which)])
        assert (of_tokens - expected)[marked(which)].abs().amax(-1).min() > 1e-4
        assert not found[which][0].any()


@pytest.mark.parametrize("margin", [0, 1])
def test_the_rewards_are_of_edits_alone(margin):
    """By the formulas, from each token's log P_θ − log p̃: sums in `preference`, in `likelihood` means, and 0 of no edits.

    At weight 1 a head is decoded by its own row, so its log P_θ is log q.
    """
    own = {0: MARKS, 1: {"chosen": "+++- --- ++----", "rejected": "+++- -++++ -----"}}[margin]
    options = {"contrast_on": "edits", "edit_margin": margin}
    preference, likelihood = Preference(beta=0.3, **options), Likelihood(contrast=2.0, beta=0.7, **options)
    seen, other = Seen(NEAR, preference, HEAD), Seen(NEAR, likelihood, HEAD)
    sums, means = {}, {}
    for which, marks in own.items():
        gains = iter(seen.log_ratios(which).tolist())
        counted = [[gain for mark in word for gain in [next(gains)] if mark == "+"] for word in marks.split()]
        sums[which] = [sum(some) for some in counted]
        means[which] = [sum(some) / len(some) if some else 0.0 for some in counted]
    softplus = [math.log1p(math.exp(-0.3 * (a - b))) for a, b in zip(*sums.values(), strict=True)]
    assert seen.losses.tolist() == pytest.approx(softplus)
    nll = Seen(NEAR, Likelihood(contrast=0.0), HEAD).losses.tolist()
    softplus = [math.log1p(math.exp(-0.7 * (a - b))) for a, b in zip(*means.values(), strict=True)]
    assert other.losses.tolist() == pytest.approx([n + 2 * s for n, s in zip(nll, softplus, strict=True)])


def test_a_batch_has_marks_where_they_are_asked_for():
    items = [Item(example) for example in NEAR]
    plain, batch = collate(items), collate(items, 0)
    assert batch.keys() - plain.keys() == {"chosen_edited", "rejected_edited"}
    for which in MARKS:
        assert torch.equal(batch[f"{which}_edited"], marked(which))
    assert collate([Item(Example([1], [2, 0], []))], 0).keys() == collate([Item(Example([1], [2, 0], []))]).keys()
    with pytest.raises(InvalidOption, match=r"a loss looks at batch\.edited, and its `edits` is None"):
        Batch(plain, PRODUCT, 2.5, lambda loss, which: torch.zeros(0), training=True).edited()


def test_equal_answers_have_no_edits():
    """Of a pair of two equal ones the loss is the likelihood's, as on whole answers."""
    equal, setting = [Example([5, 3], [4, 8, 0], [4, 8, 0])], PRODUCT._replace(records=1)
    found = Seen(equal, Likelihood(contrast_on="edits").settle(setting), PRODUCT)
    assert not found.inputs["chosen_edited"].any()
    assert torch.equal(found.losses, Seen(equal, Likelihood(contrast=0.0).settle(setting), PRODUCT).losses)


# ---- runs


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Of each wanted answer one letter has become another in the unwanted one."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    pairs = []
    for i, row in enumerate(task_rows(48)):
        at = i % len(row["chosen"])
        pairs.append(row | {"rejected": row["chosen"][:at] + "abc"[i % 3] + row["chosen"][at + 1 :]})
    write_rows(folder / "train.jsonl", pairs)
    return folder


SETTINGS = [
    {"objective": "preference", "contrast_on": "edits"},
    {"contrast": 2.0, "contrast_on": "edits", "edit_margin": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["preference", "likelihood"])
def test_micro_batches_and_padding_change_no_loss(task, settings):
    """A step on all pairs is the sum of steps on each of them alone, and the look at them is their mean."""
    plan = task_plan(task, "none", sft_weight=0.0 if "contrast" in settings else None, **settings)
    source = ModelRows(HuggingFaceLM(load_model(task / "proposal", device="cpu"), V), "sha256:0")
    kinds = {which: source.compress(answers(NEAR, which), plan.row_layout(V), 1.0).rows for which in MARKS}
    data, model = ExampleDataset(NEAR, kinds), load_model(task / "start", device="cpu")
    trainer = AlignerTrainer(
        plan, V, 3.0, model=model, args=training_arguments(plan), train_dataset=data, eval_dataset=data,
        data_collator=lambda items: collate(items, plan.objective.edits),
    )  # fmt: skip
    items = [Item(example, {which: rows[i] for which, rows in kinds.items()}) for i, example in enumerate(NEAR)]
    with torch.no_grad():
        whole, *parts = (
            float(trainer.compute_loss(model.eval(), collate(some, plan.objective.edits)))
            for some in (items, *([item] for item in items))
        )
    assert whole == pytest.approx(sum(parts), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole / 3, rel=1e-5)


@pytest.mark.parametrize("settings", [*SETTINGS, {"aligner": "", "head_layers": 1, **SETTINGS[0]}], ids=str)
def test_a_run_on_edits_learns_and_goes_on_where_it_was_killed(task, monkeypatch, settings, tmp_path):
    """It ends with the weights of a run that was left alone, which are not those of one on whole answers."""
    weights = "model.safetensors" if "aligner" not in settings else "adapter_model.safetensors"
    report = train(task_options(task, str(tmp_path / "whole"), **settings))
    losses = [row["eval_loss"] for row in report["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert report["objective"]["contrast_on"] == "edits"
    said = json.loads((tmp_path / "whole" / "run.json").read_text())["objective_options"]
    assert said == {name: settings[name] for name in ("contrast_on", "edit_margin") if name in settings}
    kill_in_step(monkeypatch, AlignerTrainer)
    with pytest.raises(RuntimeError, match="killed"):
        train(task_options(task, str(tmp_path / "halves"), **settings))
    monkeypatch.undo()
    train(task_options(task, str(tmp_path / "halves"), **settings))
    plain = {name: value for name, value in settings.items() if name not in ("contrast_on", "edit_margin")}
    train(task_options(task, str(tmp_path / "plain"), **plain))
    whole, halves, other = (load_file(tmp_path / name / weights) for name in ("whole", "halves", "plain"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert any(not torch.allclose(whole[name], other[name], atol=1e-4) for name in whole)


def test_the_command_takes_them_foretells_them_and_refuses_another_run_in_their_place(task, capsys, tmp_path):
    words = [
        "--proposal", task / "proposal", "--aligner", task / "start", "--dataset", task / "train.jsonl", "--use_cpu",
        "--max_steps", 2, "--report_to", "none", "--disable_tqdm", "--dev_samples", 0, "--output_dir", tmp_path / "edits",
    ]  # fmt: skip
    edits = ["--contrast_on", "edits", "--edit_margin", 1]
    status, _, errors = called(capsys, "train", *words, *edits, "--json")
    assert status == 0, errors
    report = json.loads((tmp_path / "edits" / "training.json").read_text())
    assert (report["objective"]["contrast_on"], report["objective"]["edit_margin"]) == ("edits", 1)
    assert report["draft"]["metrics"]["eval_acceptance_on_answers"] > 0
    assert called(capsys, "train", *words, *edits)[0] == 0  # finished, and left alone
    status, _, errors = called(capsys, "train", *words)
    assert status == 2
    assert "holds a run with objective_options={'contrast_on': 'edits', 'edit_margin': 1}, now it is None" in " ".join(errors)
    options = task_options(task, str(tmp_path / "dry"), contrast_on="edits")
    assert estimate(options, Expected(tflops=1.0))["contrast"] == 1.0


@pytest.mark.parametrize("objective", ["likelihood", "preference"])
def test_runs_from_before_can_be_gone_on_with(task, objective, tmp_path):
    """What `run.json` says of a run on whole answers is what it said when there was nothing else."""
    train(task_options(task, str(tmp_path / "run"), {"max_steps": 2}, objective=objective))
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "objective_options" not in said
    assert not {"contrast_on", "edit_margin"} & said.keys()
    train(task_options(task, str(tmp_path / "run"), {"max_steps": 2}, objective=objective, contrast_on="answers"))
