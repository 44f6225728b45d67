"""Where training starts from: a zero output layer, or low-rank adapters, fresh or of an earlier round."""

from pathlib import Path
from typing import Any

import torch

from trimtab.errors import InvalidOption
from trimtab.models.loading import readable
from trimtab.train.options import TrainOptions

__all__ = ["add_lora", "make_lora", "read_lora", "zero_output_layer"]


def zero_output_layer(model: Any) -> None:
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


def make_lora(options: TrainOptions) -> Any:
    """The configuration of fresh LoRA adapters."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=list(options.lora_target_modules) or "all-linear",
    )


def add_lora(model: Any, config: Any, seed: int) -> Any:
    """The model inside a PEFT model with fresh LoRA adapters."""
    from peft import get_peft_model

    try:
        with torch.random.fork_rng():  # adapters are initialised from the global generator: lend it a seed, put it back
            torch.default_generator.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        raise InvalidOption(f"lora_target_modules: {str(error).splitlines()[0]}") from error
