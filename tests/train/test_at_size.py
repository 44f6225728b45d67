"""What makes training fit: checkpointing, mixed precision, workers, few open files; kills anywhere; trackers."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from processes import SHARD, run_processes
from tiny import tiny_model
from tiny_task import make_examples, make_task, task_options
from trimtab.data.examples import Example
from trimtab.errors import InvalidOption
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.train import cache as cache_module
from trimtab.train.arguments import _one_device_each
from trimtab.train.batches import ExampleDataset, collate
from trimtab.train.order import Pick
from trimtab.train.rows import CachedRows, Compressed, Layout, ModelRows
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

pytestmark = pytest.mark.slow

DEATHS = ["cache 2", "checkpoint 2", "tune 1", "save 1"]
"""Between shards; while the second checkpoint is written; and when all is trained."""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = make_task(tmp_path_factory.mktemp("task"))
    train(task_options(folder, "plain"))
    return folder


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_like_plain(task, name, **tolerance):
    mine, plain = weights(task / name), weights(task / "plain")
    assert mine.keys() == plain.keys()
    for key in mine:
        assert_close(mine[key], plain[key], **tolerance)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # 5.23's new name is not in 5.17
def test_gradient_checkpointing_changes_nothing(task):
    train(task_options(task, "checkpointing", {"gradient_checkpointing": True}))
    assert_like_plain(task, "checkpointing", atol=1e-6, rtol=1e-5)


def test_workers_read_the_same_batches(task):
    train(task_options(task, "workers", {"dataloader_num_workers": 2}))
    assert_like_plain(task, "workers", atol=0, rtol=0)


def test_bfloat16_has_float32_master_weights_that_keep_small_updates(task):
    """A step of 1e-6 is far below what bfloat16 resolves of weights of 0.1: 4e-4. It must arrive nevertheless."""
    kept = {}
    compute = AlignerTrainer.compute_loss

    def look(self, *args, **kwargs):
        kept.update({name: parameter.dtype for name, parameter in self.model.named_parameters()})
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignerTrainer, "compute_loss", look)
        small = {"bf16": True, "learning_rate": 1e-6, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_steps": 4}
        train(task_options(task, "small", small, objective="sft", rule="geometric"))
    assert set(kept.values()) == {torch.float32}
    before, after = load_file(task / "start" / "model.safetensors"), weights(task / "small")
    moved = {name: (after[name] - before[name]).abs() for name in after}
    attention = moved["model.layers.0.self_attn.q_proj.weight"]
    assert 0 < attention.max() < 1e-5
    assert (attention > 0).float().mean() > 0.9


def test_bfloat16_learns_what_float32_learns(task):
    train(task_options(task, "bf16", {"bf16": True}))
    mine, plain = (json.loads((task / name / "training.json").read_text())["metrics"] for name in ("bf16", "plain"))
    assert mine["eval_loss"] == pytest.approx(plain["eval_loss"], abs=0.1)


def test_a_run_killed_again_and_again_ends_with_the_same_aligner(task, monkeypatch):
    """`kill -9` in the cache, while a checkpoint is written, while tuning, and while the aligner is saved."""
    grouped = {"train_sampling_strategy": "group_by_length"}
    monkeypatch.setattr(cache_module, "SHARD", SHARD)  # which examples the proposal sees together shows in the last bits
    train(task_options(task, "whole", grouped))
    assert not torch.equal(weights(task / "whole")["lm_head.weight"], weights(task / "plain")["lm_head.weight"])
    for dies in [*DEATHS, ""]:
        ((status, messages),) = run_processes(task, [{"name": "killed", "training": grouped}], count=1, dies=dies)
        assert status == (-9 if dies else 0), (dies, messages)
        assert (task / "killed" / "trimtab.json").exists() == (not dies)
    mine, whole = weights(task / "killed"), weights(task / "whole")
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    mine, whole = (json.loads((task / name / "training.json").read_text()) for name in ("killed", "whole"))
    assert mine["weights_tried"] == whole["weights_tried"]
    assert mine["metrics"] == whole["metrics"]
    assert not [path for path in (task / "killed").iterdir() if path.name.startswith(".")]


def test_a_cache_of_many_files_keeps_few_of_them_open(tmp_path, monkeypatch):
    """And what was read stays right when its file was closed in between."""
    monkeypatch.setattr(cache_module, "SHARD", 1)
    monkeypatch.setattr(cache_module, "MOST_OPEN", 3)
    examples = make_examples(20)
    source = ModelRows(HuggingFaceLM(tiny_model("llama", 28)), "sha256:p")
    cache = cache_module.ProposalCache.build(tmp_path / "cache", source, "sha256:v", examples, layout=Layout(4))

    def held():
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return len({line.split()[-1] for line in maps if str(tmp_path) in line})

    first = [column.clone() for column in cache[0]]
    for i in range(20):
        assert cache[i].token.tolist() == examples[i].chosen.tolist()
    assert held() <= 3
    assert all(torch.equal(a, b) for a, b in zip(cache[0], first, strict=True))


class Made:
    """A source of rows that costs nothing."""

    vocab_size, fingerprint = 4000, "made"

    def who(self):
        return ""

    def compress(self, examples, layout, temperature):
        rows = []
        for example in examples:
            logp = torch.zeros(len(example.chosen), layout.top_k).log_softmax(-1) - 0.1
            ids = torch.arange(layout.top_k).expand_as(logp).int()
            rows.append(CachedRows(ids, logp, torch.tensor(example.chosen).int(), logp[:, 0], logp[:, 0] - 2, ids[:, :0]))
        return Compressed(rows, torch.zeros(4, dtype=torch.float64))


def test_memory_does_not_grow_with_the_cache(tmp_path, monkeypatch):
    """Reading 64 MB in random order makes no more private memory than one file's offsets and a batch."""
    monkeypatch.setattr(cache_module, "SHARD", 40)
    examples = [Example([1], [2] * 100, []) for _ in range(400)]
    cache = cache_module.ProposalCache.build(tmp_path / "cache", Made(), "sha256:v", examples, layout=Layout(200))
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert size > 60e6
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()

    def private():
        with open("/proc/self/status", encoding="utf-8") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    data = ExampleDataset(examples, {"chosen": cache})
    collate([data[Pick(i)] for i in order[:8]])
    before = private()
    for at in range(0, 400, 8):
        collate([data[Pick(i)] for i in order[at : at + 8]])
    assert private() - before < size / 10


def test_one_device_for_each_process(caplog):
    arguments = SimpleNamespace(n_gpu=4, _n_gpu=4)
    _one_device_each(arguments)
    assert arguments._n_gpu == 1
    assert "accelerate launch" in caplog.text


def test_tensorboard_has_losses_and_diagnostics(task):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(task_options(task, "tracked", {"report_to": "tensorboard"}))
    (events,) = (task / "tracked" / "runs").iterdir()
    found = EventAccumulator(str(events)).Reload()
    report = json.loads((task / "tracked" / "training.json").read_text())
    for tag, key in (("train/loss", "loss"), ("eval/nll_aligned", "eval_nll_aligned"), ("eval/log_z_std", "eval_log_z_std")):
        logged = [row[key] for row in report["history"] if key in row]
        assert [scalar.value for scalar in found.Scalars(tag)] == pytest.approx(logged[: len(found.Scalars(tag))], rel=1e-5)
        assert len(found.Scalars(tag)) >= 3


def test_nothing_is_reported_unless_asked(task):
    assert not (task / "plain" / "runs").exists()
    assert "WANDB_PROJECT" not in os.environ


@pytest.mark.parametrize(
    ("name", "said"), [("neptun", "neptun is not supported"), ("tensorboard,comet_ml", "pip install comet_ml")]
)
def test_a_tracker_that_is_not_there_is_said_before_any_work(task, name, said):
    with pytest.raises(InvalidOption, match=f"report_to: .*{said}"):
        train(task_options(task, "untracked", {"report_to": name}))
    assert not (task / "untracked").exists()
