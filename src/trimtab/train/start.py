"""Where training starts from: a zero output layer, or low-rank adapters."""

from typing import Any

import torch

from trimtab.errors import InvalidOption
from trimtab.train.options import TrainOptions

__all__ = ["add_lora", "zero_output_layer"]


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


def add_lora(model: Any, options: TrainOptions, seed: int) -> Any:
    """The model inside a PEFT model with fresh LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=list(options.lora_target_modules) or "all-linear",
    )
    try:
        with torch.random.fork_rng():  # adapters are initialised from the global generator: lend it a seed, put it back
            torch.default_generator.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        raise InvalidOption(f"lora_target_modules: {str(error).splitlines()[0]}") from error
