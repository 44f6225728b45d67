"""GGUF files, llama.cpp's format, as folders that transformers loads.

A file is converted once, into the user's cache, where its folder is named after the file's bytes. From there on it is a model
like any other: fingerprints, dry runs, adapters and saving need to know nothing of GGUF. Quantised weights become float32, so
nothing is lost beyond what the file has lost already.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import CheckpointError, ModelError, UnsupportedModel
from trimtab.extras import need
from trimtab.files import cache_folder, expand_home
from trimtab.models.digests import Seen, digest_file
from trimtab.models.gguf_tokenizer import read_tokenizer

__all__ = ["is_gguf", "load_gguf_tokenizer", "unpack_gguf"]

logger = logging.getLogger(__name__)

ARCHITECTURES: Mapping[str, str] = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""transformers' name of each `general.architecture` whose tensors we know how to read; Mistral and SmolLM say llama."""
GEMMA = ("gemma", "gemma2", "gemma3")
"""Whose norms are stored with the 1 that transformers adds, and whose activations exceed what 16-bit floats hold."""
FULL_EVERY = {"gemma2": 2, "gemma3": 6}
"""Of so many layers the last sees the whole text, the others a window; llama.cpp has these numbers in its code."""
WINDOW = 4096
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""Of a Gemma 2 whose file does not say them, as llama.cpp has it."""
LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the models of 27B, which scale queries by the hidden size over the heads."""
FORMAT = 1
"""Of the folder that is made; another one is made anew."""


def is_gguf(source: str | Path) -> bool:
    """Whether a model is named by a GGUF file."""
    return str(source).lower().endswith(".gguf")


def unpack_gguf(source: str | Path) -> Path:
    """The folder that a GGUF file was converted to, now or before.

    Raises:
        ModelError: there is no such file, or it is no GGUF file.
        UnsupportedModel: it holds a model or a tokenizer that we do not know how to read.
        CheckpointError: it lacks tensors.
    """
    path = expand_home(source)
    if not path.is_file():
        raise ModelError(f"'{source}' does not exist")
    place = cache_folder("gguf")
    if place is None:
        raise ModelError(f"'{source}' is converted into your cache, and you have no home: set XDG_CACHE_HOME")
    folder = place / f"{path.stem}-{digest_file(Seen.at(path))[:16]}-{FORMAT}"
    if not folder.is_dir():
        _convert(path, folder)
    return folder


def load_gguf_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a GGUF file, without its weights.

    Raises:
        ModelError: there is no such file, or it is no GGUF file.
        UnsupportedModel: it holds a tokenizer that we do not know how to read.
    """
    path = expand_home(source)
    if not path.is_file():
        raise ModelError(f"'{source}' does not exist")
    return read_tokenizer(_read(path)[1], str(path))


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """A file's reader, and its metadata."""
    need("gguf", f"'{path}', a GGUF file,", "gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ModelError(f"'{path}' is no GGUF file that can be read: {error}") from error


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    reader, fields = _read(path)
    logger.info("converting %s, once, into %s", path, folder)
    tokenizer = read_tokenizer(fields, str(path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = _config(fields, tensors, str(path))
    config = CONFIG_MAPPING[ARCHITECTURES[fields["general.architecture"]]](**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    halves = tensors["token_embd.weight"].tensor_type.name == "F16" and fields["general.architecture"] not in GEMMA
    dtype = torch.float16 if halves else torch.float32
    weights = dict(_weights(model, config, tensors, fields, str(path)))
    model = model.to(dtype).to_empty(device="cpu")
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, strict=True)
    model.tie_weights()
    ends = [config.eos_token_id, *_further_ends(fields, tokenizer)]
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=list(dict.fromkeys(ends)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder.parent) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        with contextlib.suppress(OSError):  # another process was faster
            Path(made).rename(folder)
            Path(made).mkdir()  # for the block to remove


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of a transformers configuration."""
    kind = str(fields["general.architecture"])
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(f"'{source}' holds a '{kind}' model; of GGUF files, {', '.join(ARCHITECTURES)} can be read")
    if fields.get(f"{kind}.expert_count"):
        raise UnsupportedModel(f"'{source}' holds a mixture of experts, which cannot be read from GGUF files")

    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if value is None:
            raise CheckpointError(f"'{source}' does not say '{kind}.{name}'")
        return value

    heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
    head_dim = int(get("attention.key_length", hidden // heads))
    bias = "blk.0.attn_q.bias" in tensors
    layers = int(get("block_count"))
    window = fields.get(f"{kind}.attention.sliding_window", WINDOW if kind == "gemma2" else None)
    more: dict[str, Any] = {"sliding_window": int(window)} if window is not None else {}
    if kind in GEMMA:
        more |= _of_gemma(fields, kind, layers, hidden // heads if LARGEST.get(kind) == layers else head_dim, window)
    rope = _rope(fields, tensors, kind, head_dim, source)
    near = {"rope_type": "default", "rope_theta": float(get("rope.freq_base_swa", 10000.0))}
    return {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": int(get("context_length")),
        "rope_parameters": rope if kind != "gemma3" else {"full_attention": rope, "sliding_attention": near},
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": None,
        **({"attention_bias": bias} if kind != "qwen2" else {}),
        **more,
    }


def _of_gemma(fields: Mapping[str, Any], kind: str, layers: int, scale: int, window: int | None) -> dict[str, Any]:
    """What the configurations of this family have beside those of others."""
    found: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}
    if kind == "gemma":
        return found
    every = FULL_EVERY[kind] if window is not None else 1
    found["layer_types"] = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    for name, default in CAPS.items():
        found[name] = fields.get(f"{kind}.{name}", default if kind == "gemma2" else None)
    return found | {"query_pre_attn_scalar": scale}


def _rope(fields: Mapping[str, Any], tensors: Mapping[str, Any], kind: str, head_dim: int, source: str) -> dict[str, Any]:
    """The parameters of rotary positions. Llama 3.1's are in a tensor of factors, from which its settings are found again."""
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    theta = float(fields.get(f"{kind}.rope.freq_base", 10000.0))
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(fields[f"{kind}.rope.scaling.factor"])}
    if scaling != "none":
        raise UnsupportedModel(f"'{source}' scales positions by '{scaling}', which cannot be read from GGUF files")
    if "rope_freqs.weight" not in tensors:
        return {"rope_type": "default", "rope_theta": theta}
    wanted = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
    for factor in (8.0, 32.0):
        found = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if torch.allclose(_llama3_factors(theta, head_dim, factor), wanted, rtol=1e-4):
            return found | {"original_max_position_embeddings": 8192}
    raise UnsupportedModel(f"'{source}' scales positions in a way that is not Llama 3.1's or 3.2's")


def _llama3_factors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """By what Llama 3.1 divides each frequency `[head_dim / 2]`."""
    wavelengths = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((8192 / wavelengths - 1) / 3).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _weights(
    model: Any, config: Any, tensors: Mapping[str, Any], fields: Mapping[str, Any], source: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a transformers model, from the tensors of a file."""
    import gguf
    from gguf.quants import dequantize

    kind = str(fields["general.architecture"])
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    unread = set(tensors) - {"rope_freqs.weight"}
    for name, parameter in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name == "lm_head.weight" and config.tie_word_embeddings:
            found = "token_embd.weight"
        if found not in tensors:
            raise CheckpointError(f"'{source}' lacks the tensor '{found}', which is {name}")
        unread.discard(found)
        weight = torch.from_numpy(dequantize(tensors[found].data, tensors[found].tensor_type).copy())
        if kind in GEMMA and name.endswith("norm.weight"):
            weight -= 1
        if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = _unpaired(weight, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        if weight.shape != parameter.shape:
            shapes = f"is {list(weight.shape)}, and {name} {list(parameter.shape)}"
            raise CheckpointError(f"'{source}': the tensor '{found}' {shapes}")
        yield name, weight
    if unread:
        raise UnsupportedModel(f"'{source}' has tensors that a '{kind}' model does not, such as '{min(unread)}'")


def _unpaired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in transformers' order: llama.cpp rotates neighbours, transformers two halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _further_ends(fields: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Tokens that end a turn, where the file names them apart from the end of sequence."""
    turn = fields.get("tokenizer.ggml.eot_token_id")
    known = tokenizer.get_vocab()
    names = [
        known[name]
        for name in ("<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
        if name in known
    ]
    return [*([int(turn)] if turn is not None else []), *names]
