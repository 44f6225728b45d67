"""Which `transformers.TrainingArguments` a run takes, as flags, and where our defaults differ from theirs."""

import dataclasses
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trimtab.options import Flag

__all__ = ["DEFAULTS", "IDLE", "OWNED", "training_flags", "training_of_effect"]

OWNED = {
    "output_dir", "remove_unused_columns", "label_names", "resume_from_checkpoint", "do_train", "do_eval", "do_predict",
    "push_to_hub", "include_for_metrics", "eval_do_concat_batches", "batch_eval_metrics", "prediction_loss_only",
}  # fmt: skip
"""`TrainingArguments` that a run sets itself."""

IDLE = {
    "label_smoothing_factor", "average_tokens_across_devices", "eval_use_gather_object", "eval_accumulation_steps",
    "length_column_name", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
}  # fmt: skip
"""`TrainingArguments` of what a run does not do: losses, evaluation and batches are its own, and it pushes nothing."""

DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "warmup_steps": 0.05,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}
"""Where we differ from `TrainingArguments`: look ten times a run, and keep the best on the development prompts."""


def training_flags(defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Flag]:
    """Those that may be given, by name; `defaults` are a command's own."""
    from transformers import TrainingArguments

    flags = {}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in OWNED | IDLE:
            continue
        theirs = None if field.default is dataclasses.MISSING else field.default
        default = {**DEFAULTS, **defaults}.get(field.name, theirs)
        text = "" if default is None else f"[default: {getattr(default, 'value', default)}]"
        flags[field.name] = Flag(_kind(field.type), text)
    return flags


def _kind(hint: Any) -> type:
    """What a value is converted to; what is neither a number nor a truth value stays text, as transformers parses it."""
    kinds = [kind for kind in typing.get_args(hint) or [hint] if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, bool) else str


def training_of_effect(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given `TrainingArguments` that a result depends on."""
    reporting = ("dir", "logging", "report", "run_name", "save_total", "hub", "tqdm", "log_level")
    return {key: value for key, value in given.items() if not any(word in key for word in reporting)}
