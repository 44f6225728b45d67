"""A task that tiny models learn in seconds: after any letters, answer with letters of `xyz`, and not of `abc`."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.data.examples import Example
from trimtab.options import nest
from trimtab.train.batches import answer_logits, rows_at
from trimtab.train.options import TrainOptions
from trimtab.train.plan import Plan, resolve

V = 28
"""Tokens of the tiny tokenizer."""
TRAINING = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-2,
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def task_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records with `prompt`, `chosen` and `rejected`; every prompt is another one."""
    draw = random.Random(seed)

    def word(letters: str, low: int, high: int) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(low, high)))

    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts.setdefault(word("defghijklmnop", 2, 7))
    return [{"prompt": prompt, "chosen": word("xyz", 2, 6), "rejected": word("abc", 2, 6)} for prompt in prompts]


def make_examples(count: int, seed: int = 0, vocab_size: int = V) -> list[Example]:
    """Prompts and answers of 1 to 6 tokens each."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, 7, (1,), generator=generator))
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    return [Example(ids(), ids(), []) for _ in range(count)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a data set as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_task(folder: Path, **tokenizer: Any) -> Path:
    """A folder with `proposal`, `start`, `train.jsonl` (48 records) and `held_out.jsonl` (16 others)."""
    save_tiny(folder / "proposal", tiny_model("llama", V, seed=1, spread=0.3), tiny_tokenizer(**tokenizer))
    save_tiny(folder / "start", tiny_model("llama", V, seed=2, spread=0.1, num_hidden_layers=1), tiny_tokenizer(**tokenizer))
    rows = task_rows(64)
    write_rows(folder / "train.jsonl", rows[:48])
    write_rows(folder / "held_out.jsonl", rows[48:])
    return folder


def answer_rows(model: Any, batch: Mapping[str, Any], which: str, vocab_size: int, temperature: float = 1.0) -> torch.Tensor:
    """A model's log-probabilities `[N, V]` at a temperature, where it predicts the tokens of the `which` answers."""
    return rows_at(*answer_logits(model, batch, which), vocab_size, temperature)


def asked(**settings: Any) -> TrainOptions:
    """Options by name, those of objectives and of `TrainingArguments` too, without the checks of what has no effect."""
    return TrainOptions(**nest(TrainOptions, settings))


def task_options(folder: Path, name: str, training: Mapping[str, Any] | None = None, **settings: Any) -> TrainOptions:
    """Options of a short run on the task, into `folder/name`; exact caches, a quarter of the prompts for development."""
    said = {
        "proposal": str(folder / "proposal"),
        "aligner": str(folder / "start"),
        "dataset": str(folder / "train.jsonl"),
        "output_dir": str(folder / name),
        "cache_top_k": 0,
        "dev_fraction": 0.25,
        "train_draft": False,  # most tests are of aligners alone
        "dev_samples": 0,
    }
    return asked(**(said | settings), training=TRAINING | dict(training or {}))


def task_plan(folder: Path, name: str, training: Mapping[str, Any] | None = None, **settings: Any) -> Plan:
    """The plan of such a run, as far as it is known without the data."""
    return resolve(task_options(folder, name, training, **settings))
