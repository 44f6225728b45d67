"""Does the largest micro-batch fit into memory? On a CPU a process that takes too much is killed without a word.

It is rehearsed without weights (`trimtab.train.rehearsal`), as `--dry_run` does.
"""

import copy
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from trimtab.data.examples import Example, mean_tokens
from trimtab.hardware import free_memory, in_bytes
from trimtab.reasons import reason_of
from trimtab.train.arguments import CHECKPOINTING, checkpoints
from trimtab.train.footprint import nbytes
from trimtab.train.head import HeadPlan
from trimtab.train.plan import Plan
from trimtab.train.rehearsal import Rehearsal, largest_step

__all__ = ["warn_of_memory"]

logger = logging.getLogger(__name__)

SMALL = 10_000_000
"""Models of fewer weights are trained sooner than they are rehearsed."""


def warn_of_memory(
    plan: Plan,
    arguments: TrainingArguments,
    vocab_size: int,
    model: Any,
    proposal: Any,
    head: HeadPlan | None,
    lora: Any,
    examples: Sequence[Example],
    kept: Sequence[Example],
) -> None:
    """Say it where training will take more than is free. Where it cannot be known, that is said, and the run goes on.

    Args:
        plan: of the run.
        arguments: of the run.
        vocab_size: V.
        model: what is trained, or of a head its proposal.
        proposal: the proposal, if it is in memory; it is given up before training, unless a head is trained.
        head: as for `Rehearsal`.
        lora: as for `Rehearsal`.
        examples: of the data.
        kept: what the proposal said itself.
    """
    free = free_memory(arguments.device)
    if free is None or model.num_parameters() < SMALL:
        return
    mean_length = mean_tokens(examples)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # the trainer wants a folder
            own = copy.copy(arguments)
            own.output_dir = scratch
            rehearsal = Rehearsal(plan, own, model.config, vocab_size, mean_length, lora, head)
            step = largest_step(rehearsal, examples, kept, own.train_batch_size)
    except Exception as error:  # whatever it is, training may do without it
        logger.warning("whether training fits into memory is not known: %s", reason_of(error))
        return
    models = [one for one in (model, proposal) if one is not None]
    here = {id(p): p for one in models for p in one.parameters() if p.device == arguments.device}
    room, weights = free + nbytes(list(here.values())), nbytes(rehearsal.parameters)
    takes, otherwise = (weights + step.batch + peak for peak in (step.peak, step.peak_otherwise))
    if takes <= room:
        return
    logger.warning(
        "the largest micro-batch, of %d examples, takes %s with all that training holds, and there are %s: a smaller"
        " --per_device_train_batch_size with as much more --gradient_accumulation_steps learns the same; %s"
        " --%s it takes %s",
        own.train_batch_size, in_bytes(takes), in_bytes(room), "without" if checkpoints(arguments) else "with", CHECKPOINTING,
        in_bytes(otherwise),
    )  # fmt: skip
