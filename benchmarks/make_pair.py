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

Shape = tuple[int, int, int, int, int, int]
"""Hidden size, MLP size, layers, heads, key heads, head width."""

PAIRS: dict[str, tuple[str, int, Shape, Shape]] = {
    "llama-8b": ("llama", 128256, (4096, 14336, 32, 32, 8, 128), (2048, 8192, 16, 32, 8, 64)),  # Llama-3.1-8B + 3.2-1B
    "qwen-14b": ("qwen2", 151936, (5120, 13824, 48, 40, 8, 128), (2048, 11008, 36, 16, 2, 128)),  # Qwen2.5-14B + 3B
    "400m": ("llama", 32000, (1024, 4096, 21, 16, 8, 64), (384, 1024, 9, 6, 3, 64)),
    "100m": ("llama", 16000, (640, 1728, 14, 10, 5, 64), (256, 640, 5, 4, 2, 64)),
}
"""Family, vocabulary, proposal, aligner. The last two are scaled down, with an aligner of a ninth of the proposal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=PAIRS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--logit_scale", type=float, default=1.0, help="factor on the output layers' weights")
    parser.add_argument("--device", default="cpu", help="where to make the weights")
    options = parser.parse_args()
    family, vocab_size, *shapes = PAIRS[options.shape]
    tokenizer = make_tokenizer(vocab_size)
    for seed, (name, shape) in enumerate(zip(("proposal", "aligner"), shapes, strict=True)):
        model = make_model(family, vocab_size, shape, seed, options)
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        print(f"{options.out / name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {options.dtype}")


def make_model(family: str, vocab_size: int, shape: Shape, seed: int, options: argparse.Namespace) -> Any:
    """A model with normal weights of transformers' usual spread."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = dict(zip(names, shape, strict=True))
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = CONFIG_MAPPING[family](
        vocab_size=vocab_size, max_position_embeddings=8192, tie_word_embeddings=False, **sizes, **ends
    )
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
