"""The shapes of a few well-known models, for estimates and benchmarks on machines that cannot ask the hub.

The numbers are those of each repository's public `config.json`; tests check them by the published counts of parameters.
"""

from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import ModelError
from trimtab.files import expand_home
from trimtab.models.gguf import is_gguf
from trimtab.models.loading import expand, load_configs

__all__ = ["SHAPES", "FoundConfig", "Shape", "find_config", "is_here", "make_config"]


class Shape(NamedTuple):
    """A model without its weights."""

    model_type: str
    tokens: int
    """V, the tokens of its tokenizer; the embedding may have more columns."""
    fields: dict[str, Any]
    """Of its transformers configuration."""


def _llama(hidden: int, mlp: int, layers: int, head_dim: int, factor: float, **more: Any) -> Shape:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields = {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope | {"original_max_position_embeddings": 8192},
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "dtype": "bfloat16",
    }
    return Shape("llama", 128256, fields | more)


def _qwen(vocab_size: int, hidden: int, mlp: int, layers: int, heads: int, key_heads: int, **more: Any) -> Shape:
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "dtype": "bfloat16",
    }
    return Shape("qwen2", 151665, fields | more)


SHAPES = {
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 128, 8.0, tie_word_embeddings=False),
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 64, 32.0, tie_word_embeddings=True),
    "Qwen/Qwen2.5-14B": _qwen(
        152064, 5120, 13824, 48, 40, 8, tie_word_embeddings=False, rms_norm_eps=1e-5, max_position_embeddings=131072
    ),
    "Qwen/Qwen2.5-3B": _qwen(
        151936, 2048, 11008, 36, 16, 2, tie_word_embeddings=True, rms_norm_eps=1e-6, max_position_embeddings=32768
    ),
}
"""By hub id."""


class FoundConfig(NamedTuple):
    """A model's configuration, and where it comes from."""

    config: Any
    generation: Any
    """Its generation configuration, or None."""
    source: str
    """Whose configuration it is: a folder or a hub id."""
    origin: str
    """Where it was found: `folder`, `hub cache`, `shapes.py` or `hub`."""
    revision: str | None = None
    """Of the hub."""


def make_config(name: str, **changes: Any) -> Any:
    """The transformers configuration of a model in `SHAPES`, with some fields changed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    shape = SHAPES[name]
    return CONFIG_MAPPING[shape.model_type](**shape.fields | changes)


def is_here(source: str, file: str = "config.json", revision: str | None = None) -> bool:
    """Whether a file of a model's repository can be read without the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if expand_home(source).is_dir() or (is_gguf(source) and expand_home(source).is_file()):
        return True
    try:
        return isinstance(try_to_load_from_cache(source, file, revision=revision), str)
    except HFValidationError:  # no hub id, so a path that leads nowhere
        return False


def find_config(source: str, expected: str | None = None, *, revision: str | None = None) -> FoundConfig:
    """The configuration of a model whose weights are not wanted, from what is at hand if that is possible.

    Args:
        source: a folder or a hub id: looked for in the hub's cache, then in `SHAPES`, then asked of the hub.
        expected: a model of the same shape, to be taken where `source` is a folder that is not there yet.
        revision: a hub revision.

    Raises:
        ModelError: nothing says what shape it has.
    """
    if is_here(source, revision=revision):
        origin = "folder" if Path(expand(source)).is_dir() else "hub cache"
        return FoundConfig(*load_configs(source, revision=revision, local_only=True), source, origin, revision)
    if source in SHAPES:
        return FoundConfig(make_config(source), None, source, "shapes.py", revision)
    if expected is not None and expected != source:
        return find_config(expected)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(
            f"'{source}' does not exist; if an earlier command is to make it, say what it will be like: expected_…"
        )
    return FoundConfig(*load_configs(source, revision=revision), source, "hub", revision)
