"""The column `weight`: n is the record n times, in training, in looks, and wherever else records are learnt from."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import trimtab
from tiny_task import asked, make_task, task_options, task_rows, write_rows
from trimtab.core.shares import best_shares
from trimtab.core.user_weights import fit_user_weights
from trimtab.data.records import Record, read_records, repeat_records
from trimtab.data.scored import read_scored
from trimtab.errors import DataError, InvalidOption
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.online.data import read_prompts
from trimtab.train.order import Updates
from trimtab.train.plan import resolve
from trimtab.train.run import run_training as train

WEIGHTS = [3, 1, 2, 1]
"""Of every four records, in turn."""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Data with weights, and the same with repeated lines instead; for development, too."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    rows = task_rows(64)
    for name, some in {"train": rows[:24], "dev": rows[48:]}.items():
        often = [WEIGHTS[i % 4] for i in range(len(some))]
        write_rows(folder / f"{name}_w.jsonl", [row | {"weight": w} for row, w in zip(some, often, strict=True)])
        write_rows(folder / f"{name}_n.jsonl", [row for row, w in zip(some, often, strict=True) for _ in range(w)])
        write_rows(folder / f"{name}_half.jsonl", [row | {"weight": 0.5} for row in some])
        write_rows(folder / f"{name}_1.jsonl", some)
    return folder


def run(task, data, name, **settings):
    paths = {"dataset": str(task / f"train_{data}.jsonl"), "eval_dataset": str(task / f"dev_{data}.jsonl")}
    report = train(task_options(task, name, **paths, **settings))
    return report, load_file(task / name / "model.safetensors")


READS_ROWS = [{}, {"rule": "mixture"}, {"train_draft": True}]


@pytest.mark.parametrize("settings", [{"objective": "sft"}, {"objective": "ram"}, *READS_ROWS], ids=str)
def test_a_weight_of_n_is_the_record_n_times(task, settings, tmp_path):
    """To the bit in what is learnt, unless it reads the proposal's rows: those come of other batches, so of other roundings.

    Looks add up the same numbers in another order.
    """
    (weighted, a), (repeated, b) = (run(task, data, str(tmp_path / data), **settings) for data in ("w", "n"))
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, **({} if settings in READS_ROWS else {"rtol": 0, "atol": 0}))
    assert weighted["metrics"] == pytest.approx(repeated["metrics"], rel=1e-5)
    assert weighted["weight"] == pytest.approx(repeated["weight"], rel=1e-6)
    tried = [torch.tensor(report["weights_tried"]) for report in (weighted, repeated)]
    torch.testing.assert_close(*tried)


def test_weights_that_are_all_alike_say_nothing(task):
    (half, a), (once, b) = (run(task, data, f"alike_{data}") for data in ("half", "1"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert half["metrics"] == pytest.approx(once["metrics"])


def test_another_weight_is_another_run(task):
    run(task, "1", "again", max_steps=1)
    write_rows(task / "train_x.jsonl", [row | {"weight": 2 if i else 1} for i, row in enumerate(task_rows(64)[:24])])
    write_rows(task / "dev_x.jsonl", task_rows(64)[48:])
    with pytest.raises(InvalidOption, match="data"):
        run(task, "x", "again", max_steps=1)


def test_a_part_of_a_weight_is_a_part_of_the_loss():
    """By hand: weights 2.5, .5, 1 are (3 of 5/6), (1 of 1/2), (1 of 1); in all 4 of 5 occurrences, so each is 5/4 as heavy."""
    order = Updates([1, 1, 1], batch_size=5, weights=[2.5, 0.5, 1.0])
    order.set_epoch(0)
    [[*picks]] = list(order)
    assert len(order) == 1
    totals = {place: sum(pick.share for pick in picks if pick.place == place) for place in range(3)}
    assert [sum(pick.place == place for pick in picks) for place in range(3)] == [3, 1, 1]
    assert totals == pytest.approx({0: 2.5 / 4, 1: 0.5 / 4, 2: 1 / 4})  # of a mean: they sum to 1


@pytest.mark.parametrize("value", [-1, "3", True, float("nan"), float("inf"), [1]])
def test_what_is_no_weight_is_named_with_the_way_out(tmp_path, value):
    rows = [{"prompt": "d", "completion": "x"}, {"prompt": "e", "completion": "y", "weight": value}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    message = r"d\.jsonl:2: 'weight' must be a number from 0 to 100000, not .*name the others by --columns"
    with pytest.raises(DataError, match=message):
        read_records(str(path), weights=True)
    assert [record.weight for record in read_records(str(path))] == [1, 1]  # where nobody trains it is a column like others
    how = SimpleNamespace(columns=("prompt=prompt", "completion=completion"))
    assert [record.weight for record in read_records(str(path), how=how, weights=True)] == [1, 1]


def test_a_column_may_be_called_otherwise_and_be_empty(tmp_path):
    rows = [{"p": "d", "c": "x", "n": 4}, {"p": "e", "c": "y", "n": None}, {"p": "f", "c": "y", "n": 0}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    how = SimpleNamespace(columns=("prompt=p", "completion=c", "weight=n"))
    assert [(r.prompt, r.weight) for r in read_records(str(path), how=how, weights=True)] == [("d", 4), ("e", 1)]
    write_rows(path, [row | {"n": 0} for row in rows])
    with pytest.raises(DataError, match="holds no records of a weight above 0"):
        read_records(str(path), how=how, weights=True)


def test_a_dry_run_counts_the_steps(task):
    same = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    found = []
    for data in ("w", "n"):
        paths = {"dataset": str(task / f"train_{data}.jsonl"), "eval_dataset": str(task / f"dev_{data}.jsonl")}
        found.append(estimate(task_options(task, "dry", same, **paths), Expected(tflops=1.0)))
    assert found[0]["steps"] == found[1]["steps"] == 2 * -(-42 // 8)
    assert found[0]["data"]["examples"] == 24


def test_prompts_of_rounds_are_repeated(tmp_path):
    rows = [{"prompt": "d", "weight": 2}, {"prompt": "e"}, {"prompt": "f", "weight": 0}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    plan = resolve(asked(proposal="p", dataset=str(path), eval_dataset=str(path), objective="sft", output_dir="o"))
    assert [[record.prompt for record in part] for part in read_prompts(plan, columns=False)] == [["d", "d", "e"]] * 2
    with pytest.raises(DataError, match=r"'weight' must be a whole number where answers are drawn, not 1\.5"):
        repeat_records([Record("d", None, None, "a:1", weight=1.5)])


def test_scored_answers_are_repeated(tmp_path):
    row = {"prompt": "d", "completion": "x", "score": 1.0}
    path = write_rows(tmp_path / "s.jsonl", [row | {"weight": 2}, row | {"score": 2}, row | {"weight": 0}])
    assert [one.score for one in read_scored(path)] == [1, 1, 2]
    write_rows(path, [row | {"weight": 0.5}])
    with pytest.raises(DataError, match=r"s\.jsonl:1: 'weight' must be a whole number"):
        list(read_scored(path))


def test_samples_keep_the_weight_of_their_record(task, tmp_path):
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "de", "weight": 2.5}, {"prompt": "fg"}])
    how = {"proposal": str(task / "proposal"), "dataset": str(data), "max_tokens": 2, "seed": 0}
    trimtab.propose(**how, out=str(tmp_path / "o.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row.get("weight") for row in rows] == [2.5, None]
    write_rows(data, [{"prompt": "de", "weight": 3}, {"prompt": "fg"}])
    trimtab.propose(**how, out=str(tmp_path / "o.jsonl"))
    assert [json.loads(line).get("weight") for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [3, None]


def test_a_users_pair_counts_as_often(task, tmp_path):
    rows = [{"prompt": "de", "chosen": "xy", "rejected": "ab"}, {"prompt": "f", "chosen": "ca", "rejected": "z"}]
    how = {"proposal": str(task / "proposal"), "aligner": [f"a={task / 'start'}"]}
    once = write_rows(tmp_path / "n.jsonl", [*[rows[0]] * 3, rows[1]])
    repeated = trimtab.fit_weights(**how, preferences=str(once))
    weighted = trimtab.fit_weights(**how, preferences=str(write_rows(tmp_path / "w.jsonl", [rows[0] | {"weight": 3}, rows[1]])))
    for name in ("weights", "interval"):
        assert weighted[name]["a"] == pytest.approx(repeated[name]["a"])
    assert weighted["agree"]["fitted"] == repeated["agree"]["fitted"]


def test_counts_are_repetitions_in_the_core():
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    counts = torch.tensor([1, 4, 2, 1, 3, 1])
    prior = torch.zeros(2)
    both = [fit_user_weights(f, prior, 1.0, 1.0, counts), fit_user_weights(f.repeat_interleave(counts, 0), prior, 1.0, 1.0)]
    torch.testing.assert_close(both[0].mean, both[1].mean)
    torch.testing.assert_close(both[0].covariance, both[1].covariance)
    p, q = (torch.rand(6, generator=generator, dtype=torch.float64).log() for _ in range(2))
    one = best_shares(p, [q], counts=counts)
    many = best_shares(p.repeat_interleave(counts), [q.repeat_interleave(counts)])
    assert one.aligners == pytest.approx(many.aligners, abs=1e-9)
    assert one.loss == pytest.approx(many.loss)
    assert one.tokens == many.tokens == 12
