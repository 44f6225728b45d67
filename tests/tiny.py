"""Tiny random models and tokenizers for tests: no weights are downloaded, every seed gives the same ones."""

import math
import os
from collections.abc import Iterable, Sequence
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
SHAPES: dict[str, dict[str, Any]] = {
    "gemma": _SHAPE,
    "gpt2": _GPT2_SHAPE,
    "gpt_neox": {k: v for k, v in _SHAPE.items() if k not in ("num_key_value_heads", "head_dim")},
    "granite": {k: v for k, v in _SHAPE.items() if k != "head_dim"},
    "llama": _SHAPE,
    "mistral": _SHAPE | {"sliding_window": None},
    "olmo2": {k: v for k, v in _SHAPE.items() if k != "head_dim"},
    "qwen2": {k: v for k, v in _SHAPE.items() if k != "head_dim"},
    "qwen3": _SHAPE,
}
EOS = 0
"""The id of `<eos>` in every tiny tokenizer."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }} {{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
"""A chat as `u hello<eos>a hi<eos>`: `tiny_tokenizer(chat_template=CHAT_TEMPLATE)` has a token for all of it."""


def tiny_model(kind: str = "llama", vocab_size: int = 32, *, seed: int = 0, spread: float = 0.5, **settings: Any) -> Any:
    """A random model of an architecture, whose rows are far from uniform."""
    config = CONFIG_MAPPING[kind](
        vocab_size=vocab_size, **{**SHAPES[kind], "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": None, **settings}
    )
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
