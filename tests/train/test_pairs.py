"""Pairs of two equal answers: counted, said, and left out of what prefers one to the other."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eval_task import called
from processes import run_processes
from tiny import EOS, tiny_tokenizer
from tiny_task import V, make_task, task_options, task_plan, task_rows, write_rows
from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, answers, encode_records
from trimtab.data.records import Record
from trimtab.errors import DataError
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, Item, collate
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.inputs import count_lacking, encode_parts, read_parts, settle_pairs
from trimtab.train.plan import Facts, resolve
from trimtab.train.rows import ModelRows
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

DIFFERENT = Example([5, 6], [7, 8, 0], [9, 0])
EQUAL = Example([5, 3], [4, 8, 0], [4, 8, 0])


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Of 48 pairs, every fourth has the wanted answer twice."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    rows = [row | ({} if i % 4 else {"rejected": row["chosen"]}) for i, row in enumerate(task_rows(64))]
    write_rows(folder / "train.jsonl", rows[:48])
    write_rows(folder / "equal.jsonl", [row | {"rejected": row["chosen"]} for row in rows[:8]])
    return folder


def test_answers_are_compared_as_the_loss_sees_them():
    """Within `max_length`, whatever is beyond; and one text is one answer, whichever of its copies was cut."""
    records = [
        Record("ab", "xyzz", "xyzq", "d:1"),
        Record("ab", "xy", "xz", "d:2"),
        Record("ab", "xy", "xy", "d:3", frozenset({"rejected"})),
        Record("ab", "xy", None, "d:4"),
    ]
    assert [e.differs for e in encode_records(records, Encoder(tiny_tokenizer(), 28, [EOS]), 5)] == [False, True, False, True]
    assert [e.differs for e in encode_records(records, Encoder(tiny_tokenizer(), 28, [EOS]), 6)] == [True, True, False, True]


def plan_on(task, parts, settings):
    everything = [example for part in parts for example in part]
    return resolve(task_options(task, "none", **settings), Facts(records=len(everything), lacking=count_lacking(everything)))


def make_trainer(task, plan, examples):
    source = ModelRows(HuggingFaceLM(load_model(task / "proposal", device="cpu"), V), "sha256:0")
    kinds = {which: source.compress(answers(examples, which), plan.row_layout(V), 1.0).rows for which in ("chosen", "rejected")}
    data, model = ExampleDataset(examples, kinds), load_model(task / "start", device="cpu")
    trainer = AlignerTrainer(
        plan,
        V,
        3.0,
        model=model,
        args=training_arguments(plan),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data,
    )
    batch = collate([Item(e, {which: rows[i] for which, rows in kinds.items()}) for i, e in enumerate(examples)])
    return trainer, model, batch


@pytest.mark.parametrize("settings", [{}, {"rule": "geometric"}, {"cache_top_k": 5}])
def test_an_equal_pair_has_no_contrast(task, settings):
    """Its loss and gradient are those of `likelihood`, in a step and in a look; a pair that differs has what it had before."""
    losses, gradients, looks = {}, {}, {}
    for contrast in (0.0, 2.0):
        for name, examples in (("equal", [EQUAL]), ("different", [DIFFERENT]), ("both", [EQUAL, DIFFERENT])):
            trainer, model, batch = make_trainer(task, task_plan(task, "none", contrast=contrast, **settings), examples)
            loss = trainer.compute_loss(model.eval(), batch)
            loss.backward()
            key = name, contrast
            losses[key], looks[key] = float(loss.detach()), trainer.evaluate()["eval_loss"]
            gradients[key] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert losses["equal", 2.0] == pytest.approx(losses["equal", 0.0], abs=1e-6)
    assert looks["equal", 2.0] == pytest.approx(looks["equal", 0.0], abs=1e-6)
    torch.testing.assert_close(gradients["equal", 2.0], gradients["equal", 0.0], atol=1e-6, rtol=1e-5)
    assert losses["different", 2.0] - losses["different", 0.0] > 0.1
    assert losses["both", 2.0] == pytest.approx(losses["equal", 0.0] + losses["different", 2.0], abs=1e-5)
    assert looks["both", 2.0] == pytest.approx((looks["equal", 0.0] + looks["different", 2.0]) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "said", "kept"),
    [
        ({}, "are left out of the contrast", 4),
        ({"objective": "ram", "alpha": 0.1}, "are kept, as draws like any other", 4),
        ({"objective": "preference"}, "are left out", 2),
        ({"objective": "sft", "rule": "geometric"}, None, 4),
        ({"contrast": 0.0}, None, 4),
    ],
    ids=str,
)
def test_they_are_counted_and_said_where_they_matter(task, caplog, settings, said, kept):
    parts = [EQUAL, DIFFERENT, DIFFERENT], [DIFFERENT, EQUAL]
    found = settle_pairs(plan_on(task, parts, settings), *(list(part) for part in parts))
    assert found.equal == 2
    assert len(found.examples) + len(found.development) == (kept + 1 if kept == 4 else 3)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ([f"2 of 5 pairs have two equal answers, and {said}"] if said else [])


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        ({}, ([EQUAL], [DIFFERENT]), "every training pair has two equal answers within max_length=1024: .* --contrast 0"),
        ({"objective": "preference"}, ([EQUAL], [DIFFERENT]), "every training pair .* take --objective sft"),
        ({"objective": "preference"}, ([DIFFERENT], [EQUAL]), "every development pair"),
    ],
)
def test_nothing_to_prefer_is_an_error(task, settings, parts, message):
    with pytest.raises(DataError, match=message):
        settle_pairs(plan_on(task, parts, settings), *parts)


@pytest.mark.slow
def test_a_run_reports_what_its_dry_run_foretells(task, capsys):
    for name, settings in (("contrast", {}), ("preference", {"objective": "preference"})):
        options = task_options(task, name, {"max_steps": 2}, **settings)
        told = estimate(options, Expected(tflops=1.0))
        report = train(options)
        assert told["data"]["equal_pairs"] == report["equal_pairs"] == 12
        saved = json.loads((task / name / "training.json").read_text(encoding="utf-8"))
        assert saved["equal_pairs"] == 12
        encoder = Encoder(tiny_tokenizer(), 28, (EOS,))
        examples, _ = encode_parts(read_parts(resolve(options), encoder.tokenizer), resolve(options), encoder, 64, 64)
        whole = sum(len(example.chosen) for example in examples)
        assert (told["data"]["tokens"] == report["tokens"] == whole) == (name == "contrast")
        assert train(options) == saved  # nothing is left to do
    words = [
        "train",
        "--dry_run",
        "--proposal",
        task / "proposal",
        "--aligner",
        task / "start",
        "--dataset",
        task / "train.jsonl",
    ]
    words += ["--output_dir", task / "none", "--assume_tflops", 1, "--use_cpu"]
    assert "pairs      12 have two equal answers" in called(capsys, *words)[1]
    with pytest.raises(DataError, match="every training pair has two equal answers"):
        train(task_options(task, "refused", dataset=str(task / "equal.jsonl")))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(task):
    for name, settings in (("contrast-1", {}), ("preference-1", {"objective": "preference"})):
        train(task_options(task, name, {"max_steps": 3}, **settings))
    runs = [
        {"name": "contrast-2", "training": {"max_steps": 3, "per_device_train_batch_size": 4}},
        {"name": "preference-2", "objective": "preference", "training": {"max_steps": 3, "per_device_train_batch_size": 4}},
    ]
    results = run_processes(task, runs, count=2)
    assert [status for status, _ in results] == [0, 0], results
    for name in ("contrast", "preference"):
        one, two = (load_file(task / f"{name}-{count}" / "model.safetensors") for count in (1, 2))
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=1e-3)
