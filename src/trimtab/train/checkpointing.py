"""Activation checkpointing, by the name that the installed transformers has for it: it was gradient checkpointing once."""

from typing import Any

from transformers import TrainingArguments

__all__ = ["CHECKPOINTING", "checkpoints", "switch_checkpointing"]

CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""The field of `TrainingArguments`."""


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
