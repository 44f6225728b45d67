"""Make a proposal and an aligner of a real pair's shape, with random weights, so that speeds can be measured without downloads.

    python benchmarks/make_pair.py --shape 400m --out pairs/400m --dtype float32
    trimtab bench --proposal pairs/400m/proposal --aligner pairs/400m/aligner

Random weights say nothing about text. Their rows are the flatter the smaller `--logit_scale` is, and the flatter both rows are,
the more drafts are accepted: so the scale sets the acceptance, which `trimtab bench` prints beside every speed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab.models.shapes import make_config

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
Shape = tuple[int, int, int, int, int, int]
"""The values of `FIELDS`."""

REAL = {
    "llama-8b": ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
    "qwen-14b": ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-3B"),
}
"""Proposal and aligner, whose shapes are in `trimtab.models.shapes`."""

SMALL: dict[str, tuple[int, Shape, Shape]] = {
    "400m": (32000, (1024, 4096, 21, 16, 8, 64), (384, 1024, 9, 6, 3, 64)),
    "100m": (16000, (640, 1728, 14, 10, 5, 64), (256, 640, 5, 4, 2, 64)),
}
"""Vocabulary, proposal, aligner: Llamas that are scaled down, with an aligner of a ninth of the proposal."""

CHANGED = {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
"""What all of them have; output layers of their own, because `--logit_scale` acts on them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*REAL, *SMALL], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--logit_scale", type=float, default=1.0, help="factor on the output layers' weights")
    parser.add_argument("--device", default="cpu", help="where to make the weights")
    options = parser.parse_args()
    configs = make_configs(options.shape)
    tokenizer = make_tokenizer(min(config.vocab_size for config in configs))
    for seed, (name, config) in enumerate(zip(("proposal", "aligner"), configs, strict=True)):
        model = make_model(config, seed, options)
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        print(f"{options.out / name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {options.dtype}")


def make_configs(pair: str) -> list[Any]:
    """The configurations of a proposal and its aligner."""
    if pair in REAL:
        return [make_config(name, **CHANGED) for name in REAL[pair]]
    vocab_size, *shapes = SMALL[pair]
    sizes = [dict(zip(FIELDS, shape, strict=True)) for shape in shapes]
    return [
        CONFIG_MAPPING["llama"](vocab_size=vocab_size, max_position_embeddings=8192, pad_token_id=None, **size, **CHANGED)
        for size in sizes
    ]


def make_model(config: Any, seed: int, options: argparse.Namespace) -> Any:
    """A model with normal weights of transformers' usual spread."""
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    generator = torch.Generator(options.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02 * (options.logit_scale if "lm_head" in name else 1.0), generator=generator)
    return model


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of that many words."""
    vocab = {"<eos>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


if __name__ == "__main__":
    main()
