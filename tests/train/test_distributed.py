"""Two processes train what one trains: order, losses, metrics, weight and aligner; and neither waits for a dead one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from processes import SHARD, run_processes
from tiny_task import make_task, task_options
from trimtab.errors import InvalidOption
from trimtab.train import cache
from trimtab.train.run import run_training as train

pytestmark = pytest.mark.slow

HALF = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "logging_steps": 1}
QUARTER = HALF | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WHOLE = HALF | {"per_device_train_batch_size": 8}
"""Eight of 36 examples in an update, the fifth of an epoch has four. Twelve for development: batches of 5, 5 and 2."""

JOBS = [
    {"name": "likelihood-2", "training": HALF},
    {"name": "accumulated-2", "training": QUARTER | {"gradient_checkpointing": True}},
    {"name": "drawn-2", "training": HALF, "cache_top_k": 5, "cache_tail_samples": 6},
    {"name": "preference-2", "training": HALF, "objective": "preference"},
    {"name": "contrast-2", "training": HALF, "contrast": 0.5},
    {"name": "lora-2", "training": HALF, "use_peft": True, "lora_dropout": 0.0},
    {"name": "head-2", "training": HALF, "aligner": "", "lora_dropout": 0.0, "keep_samples": 8},
    {"name": "fsdp_head-2", "training": HALF | {"fsdp": True}, "aligner": "", "lora_dropout": 0.0, "keep_samples": 8},
    {"name": "fsdp-2", "training": HALF | {"fsdp": True}},
    {"name": "fsdp_lora-2", "training": HALF | {"fsdp": True}, "use_peft": True, "lora_dropout": 0.0},
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder in which two processes have done all jobs."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    for status, messages in run_processes(folder, JOBS):
        assert status == 0, messages
    train(task_options(folder, "likelihood-1", WHOLE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD", SHARD)
        train(task_options(folder, "drawn-1", WHOLE, cache_top_k=5, cache_tail_samples=6))
    train(task_options(folder, "preference-1", WHOLE, objective="preference"))
    train(task_options(folder, "contrast-1", WHOLE, contrast=0.5))
    train(task_options(folder, "lora-1", WHOLE, use_peft=True, lora_dropout=0.0))
    train(task_options(folder, "head-1", WHOLE, aligner="", lora_dropout=0.0, keep_samples=8))
    return folder


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def report(folder):
    return json.loads((folder / "training.json").read_text())


@pytest.mark.parametrize(
    ("two", "one"),
    [
        ("likelihood-2", "likelihood-1"),
        ("accumulated-2", "likelihood-1"),
        ("drawn-2", "drawn-1"),
        ("preference-2", "preference-1"),
        ("contrast-2", "contrast-1"),
        ("lora-2", "lora-1"),
        ("head-2", "head-1"),
        ("fsdp_head-2", "head-1"),
        ("fsdp-2", "likelihood-1"),
        ("fsdp_lora-2", "lora-1"),
    ],
)
def test_two_processes_give_what_one_gives(task, two, one):
    """Losses and metrics at every step, the tuned weight with all that was tried, and the weights of the aligner."""
    some, other = report(task / two), report(task / one)
    for key in ("loss", "eval_loss", "eval_nll_aligned", "eval_kl_aligned_proposal", "eval_nll_rejected", "eval_log_z_std"):
        mine, theirs = ([row[key] for row in r["history"] if key in row] for r in (some, other))
        assert len(mine) == (12 if key == "loss" else 4)
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert some["weight"] == other["weight"]
    assert dict(some["weights_tried"]) == pytest.approx(dict(other["weights_tried"]), abs=1e-5)
    mine, theirs = weights(task / two), weights(task / one)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_a_cache_is_the_same_whoever_builds_it(task):
    """Byte for byte, draws included, in each of its files."""
    built = [sorted((task / name / "proposal_cache").rglob("*.safetensors")) for name in ("drawn-1", "drawn-2")]
    assert [len(files) for files in built] == [14, 14]
    assert [file.read_bytes() for file in built[0]] == [file.read_bytes() for file in built[1]]


def test_a_killed_process_ends_the_other_and_runs_go_on_exactly(task):
    """A replicated one, killed after its first checkpoint, and a sharded one, which lost its last and what came after."""
    job, sharded = {"name": "killed", "training": HALF}, next(job for job in JOBS if job["name"] == "fsdp-2")
    (first, messages), (second, _) = run_processes(task, [job], dies="step 6")
    assert second == -9
    assert first not in (0, None), messages
    assert not (task / "killed" / "training.json").exists()
    whole = weights(task / "fsdp-2")
    assert json.loads((task / "fsdp-2" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for name in ("trimtab.json", "training.json", "model.safetensors", "checkpoint-12/trainer_state.json"):
        (task / "fsdp-2" / name).unlink()
    for status, messages in run_processes(task, [job, sharded]):
        assert status == 0, messages
    for some, other in ((weights(task / "killed"), weights(task / "likelihood-2")), (weights(task / "fsdp-2"), whole)):
        assert some.keys() == other.keys()
        assert all(torch.equal(some[name], other[name]) for name in some)


def test_an_error_in_one_process_ends_the_other(task):
    """Process 0 has built its shards and waits for process 1, which has failed."""
    (first, _), (second, messages) = run_processes(task, [{"name": "failed", "training": HALF}], dies="error")
    assert "no room" in messages
    assert second == 1
    assert first not in (0, None)


def test_fsdp_is_refused_where_nothing_would_be_sharded(task):
    with pytest.raises(InvalidOption, match="fsdp: weights are sharded over several processes"):
        train(task_options(task, "refused", {"fsdp": "true"}))
    assert not (task / "refused").exists()
