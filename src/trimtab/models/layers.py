"""A smaller model out of some of a model's layers: embedding, last norm and output matrix stay as they are.

It is of the same family and vocabulary. It is no language model any more, but a short training makes it one
(`trimtab.train.sibling`), and a far better one than random weights become in that time.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.errors import InvalidOption, UnsupportedModel
from trimtab.models.masks import is_recurrent
from trimtab.models.supported import check_supported
from trimtab.reasons import reason_of

__all__ = ["OF_LAYERS", "choose_layers", "cut_config", "parse_layers", "pick_layers"]

OF_LAYERS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of configurations that have a value for each layer."""


def choose_layers(count: int, total: int) -> tuple[int, ...]:
    """The `count` of `total` layers that make the best start: spread evenly, the first and the last among them.

    One alone is the first.
    """
    return (0,) if count == 1 else tuple(round(i * (total - 1) / (count - 1)) for i in range(count))


def parse_layers(text: str, total: int | None = None) -> tuple[int, ...]:
    """Layers from what a user writes.

    Args:
        text: how many, `2`, which `choose_layers` chooses; or which ones, counted from 0, `0,1,29`; `0,` is the first alone.
        total: how many there are; None where that is not known yet, and then no more than the spelling is checked.

    Raises:
        InvalidOption: it is neither, or there are no such layers.
    """
    words = [word.strip() for word in text.removesuffix(",").split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise InvalidOption(f"layers must be how many, such as 2, or which ones, such as 0,1,29, not '{text}'")
    numbers = [int(word) for word in words]
    if "," not in text:
        if numbers[0] < 1 or (total is not None and numbers[0] > total):
            raise InvalidOption(f"layers must be from 1 to {total or 'as many as the proposal has'}, not {numbers[0]}")
        return () if total is None else choose_layers(numbers[0], total)
    if numbers != sorted(set(numbers)):
        raise InvalidOption(f"layers must be in order, each once, not '{text}'")
    if total is not None and numbers[-1] >= total:
        raise InvalidOption(f"layers: there is no layer {numbers[-1]}; the proposal's are 0 to {total - 1}")
    return tuple(numbers)


def cut_config(config: Any, layers: Sequence[int]) -> Any:
    """The configuration of a model of some layers.

    Raises:
        UnsupportedModel: the weights are codes, which cannot be trained; or the family is not supported, or has layers that
            keep states.
    """
    check_supported(config)
    if is_recurrent(config):
        raise UnsupportedModel(
            f"layers: those of a '{config.model_type}' model, some of which keep states, cannot be picked: name a small model"
            " of its vocabulary as the aligner"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel("a start is trained, and quantised weights cannot be: name the original model")
    small = copy.deepcopy(config)
    for name in OF_LAYERS:
        if values := getattr(config, name, None):
            setattr(small, name, [values[i] for i in layers])
    small.num_hidden_layers = len(layers)
    small.dtype = torch.float32
    return small


def pick_layers(model: Any, layers: Sequence[int]) -> Any:
    """A model of some of a model's layers, in the order given, with copies of its weights in float32, on the CPU.

    Args:
        model: a transformers causal language model of a supported family; it stays as it is.
        layers: which ones, from 0.

    Raises:
        UnsupportedModel: see `cut_config`.
    """
    from transformers import AutoModelForCausalLM

    config = cut_config(model.config, layers)
    blocks = f"{_blocks(model)}."
    places = {str(layer): str(place) for place, layer in enumerate(layers)}
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith(blocks):
            layer, _, rest = name.removeprefix(blocks).partition(".")
            if layer not in places:
                continue
            name = f"{blocks}{places[layer]}.{rest}"
        weights[name] = weight
    with torch.random.fork_rng(devices=[]):  # what is drawn from the global generator is overwritten, and put back
        attention = model.config._attn_implementation
        small = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    try:
        small.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UnsupportedModel(
            f"layers: what a layer of this '{model.config.model_type}' model is goes by its place, and"
            f" {list(layers)} do not fit the first {len(layers)} places: choose others ({reason_of(error)})"
        ) from error
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def _blocks(model: Any) -> str:
    """The name of the list of a model's layers."""
    total = model.config.num_hidden_layers
    lists = [
        f"{body}.{name}"
        for body, inner in model.named_children()
        for name, module in inner.named_children()
        if isinstance(module, torch.nn.ModuleList) and len(module) == total
    ]
    if len(lists) != 1:
        raise UnsupportedModel(f"this '{model.config.model_type}' model does not keep its {total} layers in one list")
    return lists[0]
