"""What a run tells `transformers.TrainingArguments`, and what it refuses there."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from trimtab.errors import InvalidOption
from trimtab.extras import need
from trimtab.reasons import reason_of
from trimtab.train.defaults import DEFAULTS, IDLE, OWNED
from trimtab.train.plan import Plan

__all__ = ["CHECKPOINTING", "checkpoints", "need_training", "switch_checkpointing", "training_arguments"]

logger = logging.getLogger(__name__)

CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""The field of `TrainingArguments` by the installed transformers' name for it: it was gradient checkpointing once."""

FOR_HEADS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "eval_steps": 0.25,
    "save_steps": 0.25,
}
"""Where heads differ from that: a low-rank adapter takes larger steps, and has learnt by heart what it sees twice."""


def need_training(what: str = "training") -> None:
    """Refuse to begin what trains where the packages for it are missing.

    Raises:
        InvalidOption: the extra `train` is not installed.
    """
    need("train", what, "accelerate", "peft")


def training_arguments(plan: Plan) -> TrainingArguments:
    """The options that are transformers' own, over our defaults.

    Raises:
        InvalidOption: one that a run sets itself, one without effect, or a value that transformers refuses; or the extra
            `train` is not installed.
    """
    need_training()
    from accelerate.utils import DistributedType

    training = plan.asked.training
    if owned := OWNED & set(training):
        raise InvalidOption(f"{min(owned)} is set by trimtab itself")
    if idle := IDLE & set(training):
        raise InvalidOption(f"{min(idle)} has no effect on the training of aligners: leave it out")
    here = {"dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": not torch.accelerator.is_available()}
    of_head = FOR_HEADS if plan.trains_head else {}
    settings = DEFAULTS | of_head | dict(plan.objective.arguments(plan.setting)) | here | training
    if isinstance(settings.get("report_to"), str):
        settings["report_to"] = settings["report_to"].replace(",", " ").split()
    if str(settings.get("fsdp")).lower() in ("true", "false"):
        settings["fsdp"] = str(settings["fsdp"]).lower() == "true"  # as text, transformers takes it for a name
    fixed = {"remove_unused_columns": False, "label_names": [], "output_dir": plan.asked.output_dir}
    try:
        arguments = TrainingArguments(**settings, **fixed)
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"training arguments: {reason_of(error)}") from error
    _check_trackers(arguments.report_to)
    _one_device_each(arguments)
    kind = getattr(arguments.distributed_state, "distributed_type", DistributedType.NO)
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU) and (
        arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    ):  # accelerate would not say a word, and shard nothing
        raise InvalidOption("fsdp: weights are sharded over several processes with an accelerator each; leave it out here")
    return arguments


def _one_device_each(arguments: Any) -> None:
    """Keep transformers from splitting each batch over threads, one for each GPU: our batches do not split that way."""
    if arguments.n_gpu > 1:
        logger.warning("one GPU of %d is used; `accelerate launch -m trimtab train …` trains on all of them", arguments.n_gpu)
        arguments._n_gpu = 1


def _check_trackers(names: Sequence[str]) -> None:
    """Find out before any work whether the trackers can be had."""
    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except ValueError as error:
            raise InvalidOption(f"report_to: {error}") from None
        except (RuntimeError, ImportError) as error:
            raise InvalidOption(f"report_to: '{name}' is not installed here (pip install {name}): {error}") from None


def checkpoints(arguments: TrainingArguments) -> bool:
    """Whether training recomputes activations in the backward pass."""
    return bool(getattr(arguments, CHECKPOINTING))


def switch_checkpointing(model: Any, arguments: TrainingArguments, on: bool) -> None:
    """Let a model recompute activations in the backward pass, or keep them."""
    if on:
        how = f"{CHECKPOINTING}_kwargs"
        getattr(model, f"{CHECKPOINTING}_enable")(**{how: getattr(arguments, how)})
    else:
        getattr(model, f"{CHECKPOINTING}_disable")()
        model.disable_input_require_grads()  # which checkpointing turns on for adapters, and leaves on
