"""Make the demo's two base models: a proposal, and a smaller one of the same vocabulary for the aligner to start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from trimtab.files import atomic_folder
from trimtab.train.progress import CompactProgress

__all__ = ["PROPOSAL", "SMALL", "Size", "pretrain", "train_tokenizer"]

BATCH = 4
"""Sequences in a training step: small, because it is the number of steps that the budget limits."""

BLOCK = 128
"""Tokens in a training sequence."""


CONTEXT = 512
"""Longest sequence that the models accept."""


class Size(NamedTuple):
    """A model's shape and how long it trains."""

    hidden: int
    layers: int
    steps: int
    learning_rate: float


PROPOSAL = Size(hidden=128, layers=3, steps=1500, learning_rate=3e-3)
SMALL = Size(hidden=64, layers=1, steps=600, learning_rate=5e-3)


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, `<|end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=CONTEXT)


def pretrain(texts: Sequence[str], tokenizer: Any, size: Size, folder: Path, seed: int, name: str) -> None:
    """Train a small Llama on documents, and save it with its tokenizer in `folder`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=size.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=seed,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model_init=lambda: LlamaForCausalLM(config), args=arguments, train_dataset=_Blocks(texts, tokenizer))
    CompactProgress.install(trainer, name)
    trainer.train()
    trainer.model.config.use_cache = True  # the trainer turns it off, and `generate` would go by what is saved
    with atomic_folder(folder) as staging:
        trainer.model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


class _Blocks(torch.utils.data.Dataset[Any]):
    """Documents end to end, with `<|end|>` between them, in blocks of equal length."""

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        end = tokenizer.eos_token_id
        ids = [token for text in texts for token in [*tokenizer(text, verbose=False)["input_ids"], end]]
        self._blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index]}
