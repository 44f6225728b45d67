"""What the layers of a model let a query see: all that is before it, a window of it, or its own chunk.

In a slot a token's column is its position, so any of these is a comparison of columns with positions. A model whose layers are
all alike takes one mask; one that mixes them takes a mapping from `layer_types` to masks, as transformers' own modules do.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UnsupportedModel

__all__ = [
    "FULL",
    "MIXED",
    "POINTWISE_LAYERS",
    "RECURRENT_LAYERS",
    "STATEFUL",
    "TOKENWISE",
    "WHOLE",
    "WINDOWED",
    "Sight",
    "context_of",
    "is_recurrent",
    "layer_sights",
    "sights_of",
]


class Sight(NamedTuple):
    """What a query at a position sees, itself among it; nothing after it."""

    window: int | None = None
    """The last so many positions; None for all."""
    chunk: int | None = None
    """Those of its own chunk, which are so long and begin at multiples of it; None for all."""

    def mask(self, position_ids: Tensor, used: int) -> Tensor:
        """`[B, 1, K, used]` True where the queries at positions `[B, K]` look at a column."""
        columns = torch.arange(used, device=position_ids.device)
        positions = position_ids[:, None, :, None]
        seen = columns <= positions
        if self.window is not None:
            seen &= columns > positions - self.window
        if self.chunk is not None:
            seen &= columns // self.chunk == positions // self.chunk
        return seen

    def sees_all(self, columns: int) -> bool:
        """Whether the first so many columns are seen from all positions that are not before them."""
        return all(limit is None or columns <= limit for limit in self)


FULL = Sight()

WHOLE = (
    "apertus", "arcee", "cohere", "deepseek_v3", "ernie4_5", "falcon", "gemma", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "nemotron", "olmo",
    "olmo2", "olmoe", "phi", "seed_oss", "stablelm",
)  # fmt: skip
"""`model_type` of the families whose modules know no window."""
WINDOWED = ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")
"""Those that give all layers the window of `sliding_window`, and read nothing else."""
MIXED = (
    "cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "ministral", "olmo3", "qwen2", "qwen2_moe",
    "qwen3", "smollm3",
)  # fmt: skip
"""Those that go layer by layer, by `layer_types`; so does a family that is in none of these, if its configuration has them."""

SIZES = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""By the kinds of layers that do not see all, the field that says how much."""


STATEFUL = (
    "bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "mamba2", "olmo_hybrid", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next",
)  # fmt: skip
"""Families with layers that keep a state."""
TOKENWISE = ("falcon_mamba", "jamba", "mamba")
"""Those whose states go on from others by one token at a time only: of several, transformers' scan forgets what was before."""
RECURRENT_LAYERS = ("conv", "hybrid", "linear_attention")
"""Kinds of layers that fold what they read into a state; `hybrid` ones attend to the whole text as well."""
POINTWISE_LAYERS = ("mlp", "moe")
"""Kinds of layers that look at no other token."""


def is_recurrent(config: Any) -> bool:
    """Whether some layers keep a state."""
    return not {*(getattr(config, "layer_types", None) or ())}.isdisjoint(RECURRENT_LAYERS)


def context_of(config: Any) -> int:
    """The most tokens of a text; where nothing limits it, more than there will be."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def sights_of(config: Any) -> dict[str, Sight]:
    """What each kind of attention sees, by its name in `layer_types`; the only one's name is of no meaning where all are alike.

    It is what the family's modules make of the fields. transformers' cache makes its own of them: where it would forget what
    the modules look at, the stock model contradicts itself, and is refused. A size as long as the context is none.

    Raises:
        UnsupportedModel: that, a kind of layer that is not known, or a size that is missing or below 1.
    """
    layers = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if is_recurrent(config):
        if config.model_type in (*WHOLE, *WINDOWED, *MIXED):
            odd = next(name for name in layers if name in RECURRENT_LAYERS)
            raise UnsupportedModel(f"layer_types: '{config.model_type}' models have no layers of {odd}")
        if "sliding_attention" in layers and config.model_type in (*STATEFUL, *TOKENWISE):
            raise UnsupportedModel(f"layer_types: '{config.model_type}' models have no layers of sliding_attention")
        layers = [name for name in layers if name not in (*POINTWISE_LAYERS, *RECURRENT_LAYERS)] + ["full_attention"] * (
            "hybrid" in layers
        )
    if odd := set(layers) - {"full_attention", *SIZES}:
        raise UnsupportedModel(f"layer_types: {min(odd)} is not supported, only full_attention, {', '.join(SIZES)}")
    window = getattr(config, "sliding_window", None)
    if config.model_type in WINDOWED and window is not None:
        if len(layers) > 1:
            raise _contradiction(config, "sliding_window", "all layers have the window, and layer_types say that some do not")
        return {"sliding_attention": _sight("sliding_attention", config)}
    listed = config.model_type in (*WHOLE, *WINDOWED, *MIXED)
    if "chunked_attention" in layers and listed and config.model_type != "llama4_text":
        raise UnsupportedModel(f"layer_types: '{config.model_type}' models have no chunked_attention")
    if is_recurrent(config) or (layers and config.model_type not in (*WHOLE, *WINDOWED)):
        return {name: _sight(name, config) for name in layers}
    for name, field in SIZES.items():
        said = getattr(config, field, None) is not None
        if said and not listed:  # its trial will show
            return {name: _sight(name, config)}
        if (name in layers or (said and not layers)) and _sight(name, config) != FULL:
            raise _contradiction(config, field, "the layers see the whole text, which transformers' cache would forget")
    return {"full_attention": FULL}


def _sight(name: str, config: Any) -> Sight:
    if name not in SIZES:
        return FULL
    field = SIZES[name]
    size = getattr(config, field, None)
    if size is None or size < 1:
        raise UnsupportedModel(f"{field} must be at least 1 for layers of {name}, not {size}")
    if size >= context_of(config):
        return FULL
    return Sight(window=size) if name == "sliding_attention" else Sight(chunk=size)


def _contradiction(config: Any, field: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{field}: in this '{config.model_type}' model, {why}; set what is not meant to null")


def layer_sights(config: Any) -> list[Sight]:
    """What each layer sees; the errors are those of `sights_of`."""
    sights, depth = sights_of(config), int(config.num_hidden_layers)
    return list(sights.values()) * depth if len(sights) == 1 else [sights[name] for name in config.layer_types]
