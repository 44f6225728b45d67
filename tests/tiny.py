"""Tiny random models and tokenizers for tests: no weights are downloaded, every seed gives the same ones."""

import math
import os
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab.models.loading import load_model
from trimtab.models.table import TableLM

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT2_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


def _but(*names: str, shape: dict[str, Any] = _SHAPE) -> dict[str, Any]:
    return {name: value for name, value in shape.items() if name not in names}


_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


SHAPES: dict[str, dict[str, Any]] = {
    "apertus": _SHAPE,
    "arcee": _SHAPE,
    "bamba": _but("head_dim") | _MAMBA | {"attn_layer_indices": [1]},
    "cohere": _but("head_dim"),
    "cohere2": _SHAPE | _MIXED,
    "cwm": _SHAPE | _MIXED,
    "deepseek_v3": _but("head_dim", "num_key_value_heads")
    | _EXPERTS
    | {
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
    }
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
    "ernie4_5": _SHAPE,
    "exaone4": _SHAPE | _MIXED,
    "falcon": _but("intermediate_size", "num_key_value_heads", "head_dim")
    | {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "falcon_h1": _SHAPE | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "falcon_mamba": _STATES,
    "gemma": _SHAPE,
    "gemma2": _SHAPE | _MIXED | {"query_pre_attn_scalar": 8},
    "gemma3_text": _SHAPE | _MIXED | {"query_pre_attn_scalar": 8},
    "glm": _SHAPE,
    "glm4": _SHAPE,
    "glm4_moe": _SHAPE | _EXPERTS | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt2": _GPT2_SHAPE,
    "gpt_bigcode": _GPT2_SHAPE,
    "gpt_neox": _but("num_key_value_heads", "head_dim"),
    "gpt_oss": _SHAPE | _EXPERTS | _MIXED,
    "gptj": _GPT2_SHAPE | {"rotary_dim": 4},
    "granite": _but("head_dim"),
    "granitemoe": _but("head_dim") | _EXPERTS,
    "granitemoehybrid": _but("head_dim")
    | _EXPERTS
    | _MAMBA
    | {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 24},
    "helium": _SHAPE,
    "hunyuan_v1_dense": _SHAPE,
    "jamba": _but("head_dim") | _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2": _but("head_dim") | {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _but("head_dim") | _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": _SHAPE,
    "llama4_text": _SHAPE
    | _EXPERTS
    | {"attention_chunk_size": 5, "layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 48}
    | {"attn_temperature_tuning": False},
    "mamba": _STATES,
    "mamba2": _STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": _SHAPE | _MIXED,
    "mistral": _SHAPE | {"sliding_window": None},
    "mixtral": _SHAPE | _EXPERTS | {"sliding_window": 5},
    "nemotron": _SHAPE,
    "olmo": _but("head_dim"),
    "olmo2": _but("head_dim"),
    "olmo3": _but("head_dim") | _MIXED,
    "olmo_hybrid": _but("head_dim") | _DELTA,
    "olmoe": _but("head_dim") | _EXPERTS,
    "phi": _but("head_dim"),
    "phi3": _but("head_dim") | {"sliding_window": 5},
    "qwen2": _but("head_dim"),
    "qwen2_moe": _but("head_dim") | _EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": _SHAPE,
    "qwen3_5_moe_text": _SHAPE | _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 24},
    "qwen3_5_text": _SHAPE | _DELTA,
    "qwen3_moe": _SHAPE | _EXPERTS,
    "qwen3_next": _SHAPE | _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 24},
    "seed_oss": _SHAPE,
    "smollm3": _but("head_dim") | {"no_rope_layers": [1, 0]},
    "stablelm": _but("head_dim"),
    "starcoder2": _but("head_dim") | {"sliding_window": 5},
}
"""Sizes of a tiny model of each architecture. A list has a value for each layer, and goes round where there are more."""
EOS = 0
"""The id of `<eos>` in every tiny tokenizer."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }} {{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
"""A chat as `u hello<eos>a hi<eos>`: `tiny_tokenizer(chat_template=CHAT_TEMPLATE)` has a token for all of it."""


def tiny_model(kind: str = "llama", vocab_size: int = 32, *, seed: int = 0, spread: float = 0.5, **settings: Any) -> Any:
    """A random model of an architecture, whose rows are far from uniform."""
    fields = {**SHAPES[kind], "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": None, **settings}
    layers = fields.get("num_hidden_layers", fields.get("n_layer"))
    going_round = {name: list(islice(cycle(fields[name]), layers)) for name in SHAPES[kind] if isinstance(fields[name], list)}
    config = CONFIG_MAPPING[kind](vocab_size=vocab_size, **fields | going_round)
    with torch.random.fork_rng(devices=[]):  # some families draw vectors
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread, generator=generator)
    return model.eval()


def tiny_tokenizer(letters: str = "abcdefghijklmnopqrstuvwxyz ", **settings: Any) -> PreTrainedTokenizerFast:
    """One token for each character, plus `<eos>` with id 0."""
    vocab = {"<eos>": EOS} | {letter: i + 1 for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **settings)


def bpe_tokenizer(texts: Iterable[str], merges: int = 60, **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts: every byte has a token, so a token may be a part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1 + len(alphabet) + merges, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **settings)


class ScriptedLM(TableLM):
    """After a prompt of one token, exactly the tokens of a script, and then `<eos>` for ever."""

    def __init__(self, script: Sequence[int], vocab_size: int) -> None:
        super().__init__(torch.zeros(vocab_size, dtype=torch.float64))
        self.script = list(script)

    @property
    def fingerprint(self) -> str:
        """It goes by the script."""
        return f"{super().fingerprint} {self.script}"

    def row(self, prefix: Sequence[int]) -> torch.Tensor:
        """All mass on the script's next token."""
        row = torch.full((self.vocab_size,), -math.inf, dtype=torch.float64)
        row[self.script[len(prefix) - 1] if len(prefix) <= len(self.script) else EOS] = 0.0
        return row


def save_tiny(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A folder that transformers loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_lora(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Path:
    """A folder of a LoRA adapter of which all weights are random, so that it changes every row."""
    model = get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)
