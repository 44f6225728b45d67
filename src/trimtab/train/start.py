"""Where training starts from: a zero output layer, or low-rank adapters, fresh or of an earlier round."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.errors import InvalidOption
from trimtab.models.adapter_folder import Base, base_of
from trimtab.models.aligner import Description, load_files
from trimtab.models.fingerprint import Files
from trimtab.models.loading import load_model, readable
from trimtab.models.shapes import is_here
from trimtab.models.weight_files import commit_of, folder_of
from trimtab.reasons import reason_of
from trimtab.train.plan import Plan

__all__ = ["Start", "describe_lora", "load_start", "make_lora", "pinned", "prepare_model", "read_lora"]

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """The aligner that training starts from."""

    model: Any
    files: Files
    draft: Base
    """What its drafter would start from."""


def load_start(plan: Plan, found: Description) -> Start:
    """Load the aligner that training starts from."""
    if found.is_adapter:
        read_lora(found.folder)
        model, files = load_files(found, dtype=torch.float32, device="cpu", trainable=True)
        base = base_of(found.folder)
    else:
        base = Base(plan.asked.aligner)
        model, files = Files.of(partial(load_model, plan.asked.aligner, dtype=torch.float32, device="cpu"), base)
    return Start(model, files, Base(str(found.draft)) if found.draft else base)


def prepare_model(model: Any, plan: Plan, seed: int, lora: Any = None) -> Any:
    """The aligner as it starts, with fresh adapters of the given configuration or of the plan, unless it has some."""
    if plan.asked.start == "uniform":
        logger.info("the output layer starts at zero: the aligned model starts at the proposal")
        _zero_output_layer(model)
    if not plan.asked.use_peft or hasattr(model, "peft_config"):
        return model
    if lora is not None:
        model.name_or_path = lora.base_model_name_or_path
    elif Path(plan.asked.aligner).exists():
        model.name_or_path = str(Path(plan.asked.aligner).resolve())  # the adapter must find its base from anywhere
    try:
        return _add_lora(model, lora or make_lora(plan, plan.asked.aligner), seed)
    except ValueError as error:
        name = "aligner" if lora else "lora_target_modules"
        raise InvalidOption(f"{name}: {reason_of(error)}") from error


def _zero_output_layer(model: Any) -> None:
    """Make every next-token distribution uniform: an untied output layer of zeros, in place.

    The aligned model then *is* the proposal, and training moves it away from there.
    """
    old = model.get_output_embeddings()
    like = {"dtype": old.weight.dtype, "device": old.weight.device}
    new = torch.nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, **like)
    torch.nn.init.zeros_(new.weight)
    if new.bias is not None:
        torch.nn.init.zeros_(new.bias)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(new)


def read_lora(folder: Path) -> Any:
    """The configuration of an adapter that is to be trained on.

    Raises:
        InvalidOption: it is an adapter of another kind.
        ModelError: it cannot be read.
    """
    from peft import PeftConfig

    with readable(folder, "aligner"):
        config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA":
        raise InvalidOption(f"aligner: '{folder}' is an adapter of type {config.peft_type}; only LoRA can be trained on")
    config.inference_mode = False
    return config


def describe_lora(folder: Path) -> dict[str, Any]:
    """What training depends on of an adapter's configuration, beside its weights."""
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    apart = ("base_model_name_or_path", "inference_mode", "peft_version")
    return {key: value for key, value in values.items() if key not in apart}


def make_lora(plan: Plan, base: str, modules: Sequence[str] | str = "all-linear") -> Any:
    """The configuration of fresh LoRA adapters, which belong to this state of a base that is on the hub.

    Args:
        plan: of the run.
        base: what they adapt.
        modules: which of its modules, where the options name none.
    """
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.asked.lora_r,
        lora_alpha=plan.asked.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=list(plan.asked.lora_target_modules) or modules,
        revision=pinned(base),
    )


def pinned(base: str) -> str | None:
    """The state of a base on the hub that an adapter of it belongs to; None for a folder."""
    return commit_of(folder_of(base)) if is_here(base) else None


def _add_lora(model: Any, config: Any, seed: int) -> Any:
    """The model inside a PEFT model with fresh LoRA adapters."""
    from peft import get_peft_model

    with torch.random.fork_rng():  # adapters are initialised from the global generator: lend it a seed, put it back
        torch.default_generator.manual_seed(seed)
        return get_peft_model(model, config)
