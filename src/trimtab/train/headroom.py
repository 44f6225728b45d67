"""Does the largest micro-batch fit into memory? On a CPU a process that takes too much is killed without a word.

It is rehearsed without weights (`trimtab.train.rehearsal`), as `--dry_run` does.
"""

import copy
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from trimtab.hardware import free_memory, in_bytes
from trimtab.train.examples import Example
from trimtab.train.head import HeadPlan
from trimtab.train.options import TrainOptions
from trimtab.train.rehearsal import Rehearsal, largest_step

__all__ = ["warn_of_memory"]

logger = logging.getLogger(__name__)

SMALL = 10_000_000
"""Models of fewer weights are trained sooner than they are rehearsed."""


def warn_of_memory(
    options: TrainOptions,
    arguments: TrainingArguments,
    model: Any,
    vocab_size: int,
    head: HeadPlan | None,
    lora: Any,
    examples: Sequence[Example],
    kept: Sequence[Example],
) -> None:
    """Say it where a micro-batch will take more than is free.

    Args:
        options: of the run.
        arguments: of the run.
        model: what is trained, or of a head its proposal; it is in memory already.
        vocab_size: V.
        head: as for `Rehearsal`.
        lora: as for `Rehearsal`.
        examples: of the data.
        kept: what the proposal said itself.
    """
    free = free_memory(arguments.device)
    if free is None or model.num_parameters() < SMALL:
        return
    mean_length = sum(len(example.chosen) for example in examples) / len(examples)
    with tempfile.TemporaryDirectory() as scratch:  # the trainer wants a folder
        own = copy.copy(arguments)
        own.output_dir = scratch
        rehearsal = Rehearsal(options, own, model.config, vocab_size, mean_length, lora, head)
        step = largest_step(rehearsal, examples, kept, own.train_batch_size)
    if step.batch + step.peak <= free:
        return
    otherwise = "without" if arguments.activation_checkpointing else "with"
    takes, there, then = map(in_bytes, (step.batch + step.peak, free, step.batch + step.peak_otherwise))
    logger.warning(
        "the largest micro-batch, of %d examples, takes %s, and %s are free: a smaller --per_device_train_batch_size"
        " with as much more --gradient_accumulation_steps learns the same; %s --activation_checkpointing it takes %s",
        own.train_batch_size, takes, there, otherwise, then,
    )  # fmt: skip
