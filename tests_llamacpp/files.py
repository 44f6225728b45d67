"""GGUF files of tiny models in several types, and the same models for transformers."""

from pathlib import Path
from typing import Any

import gguf

from gguf_files import write
from kinds import EOS, byte_level
from tiny import tiny_model

TYPES = {"F32": None, "F16": gguf.GGMLQuantizationType.F16, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Multiples of 32, as Q8_0 wants them."""
SHAPE |= {"max_position_embeddings": 2048}
_WINDOWS = {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "sliding_window": 5}
GEMMA = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": _WINDOWS | {"layer_types": ["sliding_attention", "full_attention"], "attn_logit_softcapping": 2.0},
    "gemma3": _WINDOWS | {"layer_types": [*["sliding_attention"] * 5, "full_attention"]},
}
"""Layers of each kind; llama.cpp has in its code which ones see how much."""


def make(
    folder: Path, kind: str = "llama", stored: str = "F32", *, seed: int = 1, spread: float = 0.3
) -> tuple[Path, Any, Any]:
    """A file, its model and its tokenizer; `kind` is what llama.cpp calls it."""
    tokenizer = byte_level()
    shape = SHAPE | GEMMA.get(kind, {})
    name = "gemma3_text" if kind == "gemma3" else kind
    model = tiny_model(name, len(tokenizer), seed=seed, spread=spread, eos_token_id=EOS, bos_token_id=1, **shape)
    path = write(folder / f"{kind}-{stored}-{seed}.gguf", kind, model, tokenizer, quantized=TYPES[stored])
    return path, model, tokenizer
