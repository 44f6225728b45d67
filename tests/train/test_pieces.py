"""Looking at development data: the figures of whole rows, and no more memory than a training step takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_model
from tiny_task import make_task, task_plan
from trimtab.core.logprobs import Warp, gather, in_nucleus, kl_divergence, warp
from trimtab.core.objectives import acceptance, distillation, likelihood
from trimtab.core.rules import Product
from trimtab.data.examples import Example
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, Item, collate
from trimtab.train.draft import DraftTrainer
from trimtab.train.footprint import Ledger, nbytes
from trimtab.train.pieces import Room, shape
from trimtab.train.rehearsal import Rehearsal
from trimtab.train.rows import CachedRows, Layout, compress, tail_points
from trimtab.train.trainer import AlignerTrainer

V = 400
"""Wide beside the models' 32: rows are what counts, as they do at size."""
CASES: dict[str, dict[str, Any]] = {
    "likelihood": {"aligner_temperature": 1.7},
    "draws": {"cache_top_k": 5, "cache_tail_samples": 7},
    "geometric": {"rule": "geometric", "cache_top_k": 5},
    "contrast": {"contrast": 0.5, "cache_top_k": 5},
    "sft": {"objective": "sft", "rule": "geometric"},
    "ram": {"objective": "ram", "alpha": 0.1},
    "preference": {"objective": "preference"},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def make_pairs(count: int, seed: int, longest: int = 9) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(1, V, (length,), generator=generator).tolist()

    return [Example(ids(), ids(), ids()) for _ in range(count)]


def random_row(example: Example, answer: list[int]) -> torch.Tensor:
    """The proposal's rows on an answer `[T, V]`: some that are the same wherever they are asked for."""
    generator = torch.Generator().manual_seed(sum(example.prompt) + 7 * sum(answer))
    return (2 * torch.randn(len(answer), V, generator=generator)).log_softmax(-1)


def cached(examples: list[Example], which: str, layout: Layout) -> list[CachedRows]:
    rows = []
    for example in examples:
        answer = getattr(example, which)
        points = tail_points(Example(example.prompt, answer, []), layout.samples)
        rows.append(compress(random_row(example, answer), torch.tensor(answer), layout.top_k, points))
    return rows


def make_trainer(task: Path, settings: dict[str, Any], training: dict[str, Any], examples: Any, development: Any) -> Any:
    plan = task_plan(task, "none", training, **settings)
    data = []
    for part, some in (("train", examples), ("dev", development)):
        kinds = [which for one, which in plan.cached_answers if one == part]
        data.append(ExampleDataset(some, {which: cached(some, which, plan.row_layout(V)) for which in kinds}))
    trainer = AlignerTrainer(
        plan, V, 4.0, model=tiny_model("llama", V, seed=3), args=training_arguments(plan), data_collator=collate,
        train_dataset=data[0], eval_dataset=data[1],
    )  # fmt: skip
    trainer.create_optimizer()
    return trainer


def rows_alone(model: Any, example: Example, answer: list[int], temperature: float) -> torch.Tensor:
    """The model's rows on an answer, from a plain forward pass over this example alone."""
    with torch.no_grad():
        logits = model(torch.tensor([[*example.prompt, *answer]])).logits[0, len(example.prompt) - 1 : -1]
    return warp(logits.log_softmax(-1), Warp(temperature))


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_figures_are_those_of_whole_rows(task, name, pairs):
    """Every metric, from the definitions on whole rows of each example alone; batches and pieces are not to be seen."""
    settings = CASES[name]
    development = make_pairs(13, 2)
    if not pairs and not task_plan(task, "none", **settings).reads_rejected:
        development = [example._replace(rejected=[]) for example in development]
    trainer = make_trainer(task, settings, {"per_device_eval_batch_size": 5}, make_pairs(20, 1), development)
    assert trainer.room.piece < sum(len(example.chosen) for example in development) / 4
    got = trainer.evaluate()

    plan, model = trainer._plan, trainer.model
    objective, rule, weight, temperature = plan.objective, plan.rule, plan.weight, plan.temperatures.aligner
    sums, losses, rejected, won = [], [], [], []
    for i, example in enumerate(development):
        alone, decoded, gains, rewards = {}, {}, {}, {}
        for which in ("chosen", "rejected"):
            answer = torch.tensor(getattr(example, which), dtype=torch.long)
            if not len(answer):
                continue
            logq = rows_alone(model, example, answer.tolist(), temperature)
            alone[which] = -gather(logq, answer)
            if which in trainer.eval_dataset.caches:
                kept = trainer.eval_dataset.caches[which][i]
                logp = kept.rebuild(V)
                decoded[which] = likelihood(rule, logp, logq, weight, answer)
                rewards[which] = (-decoded[which] - gather(logp, answer)).sum()
                gains[which] = rewards[which] / len(answer)
            if which == "chosen":
                even = kept.evenly().rebuild(V)
                aligned = rule.target(logp, [logq], torch.tensor([weight]))
                log_z = Product().log_z(logp, [logq], torch.tensor([weight])) + weight * torch.tensor(float(V)).log()
                sums.append(
                    torch.stack(
                        [
                            -gather(logp, answer), alone[which], -gather(aligned, answer), log_z, log_z**2,
                            kl_divergence(aligned, logp), kl_divergence(even, logq), in_nucleus(even, answer, 0.95).float(),
                        ],
                        -1,
                    )
                )  # fmt: skip
            else:
                rejected.append(alone[which])
        if objective.name == "likelihood":
            loss = decoded["chosen"].sum() / 4
            if objective.contrast:
                loss = loss - 0.5 * torch.nn.functional.logsigmoid(gains["chosen"] - gains["rejected"])
        elif objective.name == "ram":
            loss = (alone["chosen"].sum() - 0.1 * alone["rejected"].sum()) / 4
        elif objective.name == "preference":
            loss = -torch.nn.functional.logsigmoid(0.1 * (alone["rejected"].sum() - alone["chosen"].sum()))
        else:
            loss = alone["chosen"].sum() / 4
        losses.append(loss)
        if len(rewards) == 2:
            won.append(float(rewards["chosen"] > rewards["rejected"]))
    p, q, aligned_nll, z, z2, moved, apart, inside = torch.cat(sums).double().mean(0).tolist()
    expected = {
        "eval_nll_proposal": p, "eval_nll_aligner": q, "eval_nll_aligned": aligned_nll, "eval_log_z_mean": z,
        "eval_log_z_std": max(z2 - z * z, 0) ** 0.5, "eval_kl_aligned_proposal": moved, "eval_kl_proposal_aligner": apart,
        "eval_in_nucleus": inside, "eval_loss": float(torch.stack(losses).mean()),
    }  # fmt: skip
    if rejected:
        expected["eval_nll_rejected"] = float(torch.cat(rejected).mean())
    if won:
        expected["eval_rewards/accuracies"] = sum(won) / len(won)
    assert got == pytest.approx(expected | {"epoch": 0}, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("training", [{}, {"bf16": True}, {"activation_checkpointing": True}, {"optim": "sgd"}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_look_takes_no_more_than_a_training_step(task, name, training):
    """The real peak of all development batches, four times as large if they might, beside that of the largest real step."""
    examples, development = make_pairs(24, 1), make_pairs(24, 2)
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 16}
    trainer = make_trainer(task, CASES[name], training | sizes, examples, development)
    model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    if training.get("activation_checkpointing"):
        model.activation_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    order = sorted(range(24), key=lambda i: shape([examples[i]]).rows, reverse=True)
    batch = collate([Item(examples[i], {k: c[i] for k, c in trainer.train_dataset.caches.items()}) for i in order[:4]])
    with Ledger() as ledger:
        trainer.training_step(model, batch)
    step = ledger.peak + nbytes(batch)
    model.zero_grad()
    with Ledger() as ledger:
        trainer.evaluate()
    assert ledger.peak < step


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 4])
def test_a_dry_run_says_so(task, tmp_path, name, size):
    """At the vocabulary and the length of real ones, where the longest development examples are longer than training's."""
    settings = {"cache_top_k": 64} | CASES[name]
    plan = task_plan(task, "none", {"per_device_train_batch_size": size, "bf16": True}, **settings)
    arguments = training_arguments(plan)
    arguments.output_dir = str(tmp_path)
    config = tiny_model("llama", 32000, max_position_embeddings=512).config
    examples, development = ([Example([1] * n, [2] * n, [3] * n) for n in (50, 120, longest)] * 2 for longest in (200, 220))
    if not plan.reads_rejected:
        examples = [example._replace(rejected=[]) for example in examples]
    rehearsal = Rehearsal(plan, arguments, config, 32000, 100.0)
    step = rehearsal.step(sorted(examples, key=lambda example: -len(example.prompt))[:size])
    assert rehearsal.evaluation(examples, development) < step.batch + step.peak - step.optimizer


@pytest.mark.parametrize("most", [1, 3, 8, 100])
@pytest.mark.parametrize("size", [1, 4])
def test_batches_are_no_larger_than_trainings_largest(size, most):
    """Of few examples, of prompts and answers that are long in turn; an example that is longer than any has one to itself."""
    examples, development = make_pairs(30, 3, longest=12), make_pairs(50, 4, longest=14)
    room = Room.of(examples, size)
    batches = room.batches(development, most)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    for batch in batches:
        tokens, rows = shape([development[i] for i in batch])
        assert len(batch) == 1 or (len(batch) <= most and tokens <= room.tokens and rows <= room.rows)
        padded = collate([Item(development[i]) for i in batch])
        assert max(padded["chosen_ids"].numel(), padded["rejected_ids"].numel()) <= tokens
    assert len(batches) < 50 or most == 1 or size == 1


def test_a_drafters_figures_are_those_of_whole_rows(task):
    """KL(aligned‖draft) and Σ min(aligned, draft), with the aligner at its temperature and the drafter at 1."""
    development, settings = make_pairs(9, 5), CASES["likelihood"]
    base = make_trainer(task, settings, {}, make_pairs(20, 1), development)
    aligner, draft = tiny_model("llama", V, seed=5), tiny_model("llama", V, seed=6)
    trainer = DraftTrainer(
        base._plan, V, 4.0, aligner=aligner, weight=0.7, model=draft, args=base.args, data_collator=collate,
        train_dataset=base.train_dataset, eval_dataset=base.eval_dataset,
    )  # fmt: skip
    got = trainer.evaluate()
    kl, kept = [], []
    for i, example in enumerate(development):
        logq = rows_alone(aligner, example, example.chosen, 1.7)
        logp = trainer.eval_dataset.caches["chosen"][i].rebuild(V)
        target, logd = Product().target(logp, [logq], torch.tensor([0.7])), rows_alone(draft, example, example.chosen, 1.0)
        kl.append(distillation(target, logd))
        kept.append(acceptance(target, logd))
    assert got == pytest.approx(
        {
            "eval_loss": float(torch.cat(kl).sum() / 9 / 4),
            "eval_kl_aligned_draft": float(torch.cat(kl).mean()),
            "eval_acceptance_on_answers": float(torch.cat(kept).mean()),
            "epoch": 0,
        },
        rel=1e-4,
    )
