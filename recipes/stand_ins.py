"""Tiny models of the recipes' architectures and a few rows in the columns of their data sets, to try a recipe without a hub.

    python recipes/stand_ins.py --out stand-ins

`llama/proposal`, `llama/aligner`, `qwen/proposal` and `qwen/aligner` are random models with the fields of the real ones but for
their sizes, and a small tokenizer with the real names of the special tokens. The data are `ultrachat.jsonl`, `tldr.jsonl` and
`hh.jsonl`, and `alpaca_eval_gpt4_baseline.json`. What comes of a recipe with them says nothing but that it runs.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trimtab.models.shapes import SHAPES, make_config

PAIRS = {
    "llama": ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B", "<|begin_of_text|>", "<|end_of_text|>"),
    "qwen": ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-3B", None, "<|endoftext|>"),
}
"""Proposal, aligner, and the tokens at the beginning and the end of a text."""

THINGS = ("a kettle", "the moon", "an old bicycle", "rye bread", "a rowing boat", "chess", "a lighthouse", "honey")
DEEDS = ("explain", "describe", "praise", "compare", "repair", "draw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    make_stand_ins(parser.parse_args().out)


def make_stand_ins(out: Path) -> None:
    """Write everything into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    data = {"ultrachat": ultrachat_rows(), "tldr": tldr_rows(), "hh": hh_rows()}
    for name, rows in data.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = [{"instruction": f"Please {deed} {thing}.", "output": answer(deed, thing)} for deed, thing in pairs()[:6]]
    baseline = [row | {"generator": "gpt4_1106_preview", "dataset": "stand-in"} for row in asked]
    (out / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(baseline), encoding="utf-8")
    texts = [json.dumps(row) for rows in data.values() for row in rows]
    for family, (proposal, aligner, begin, end) in PAIRS.items():
        tokenizer = make_tokenizer(texts, begin, end)
        for seed, (role, name) in enumerate((("proposal", proposal), ("aligner", aligner))):
            make_model(name, len(tokenizer), 3 - seed, seed).save_pretrained(out / family / role)
            tokenizer.save_pretrained(out / family / role)


def make_model(name: str, tokens: int, layers: int, seed: int) -> Any:
    """A model with the fields of a real one, but tiny; its embedding is padded, as the real ones' are."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    heads = {"head_dim": 8} if "head_dim" in SHAPES[name].fields else {}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    config = make_config(
        name,
        vocab_size=tokens + 8 * (2 - seed),
        num_hidden_layers=layers,
        max_position_embeddings=16384,
        **sizes,
        **heads,
        **ends,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def make_tokenizer(texts: Iterable[str], begin: str | None, end: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer; like Llama's it puts `begin` before every text, if there is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [begin or "<|unused|>", end]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


def pairs() -> list[tuple[str, str]]:
    return [(deed, thing) for deed in DEEDS for thing in THINGS]


def answer(deed: str, thing: str) -> str:
    return f"Of course. To {deed} {thing}, begin slowly and look closely."


def ultrachat_rows() -> list[Mapping[str, Any]]:
    """As HuggingFaceH4/ultrachat_200k: a prompt, its id, and the messages that begin with it."""
    rows: list[Mapping[str, Any]] = []
    for i, (deed, thing) in enumerate(pairs()):
        ask = f"Please {deed} {thing}."
        said = (
            ("user", ask),
            ("assistant", answer(deed, thing)),
            ("user", "Go on."),
            ("assistant", f"That is all of {thing}."),
        )
        messages = [{"role": role, "content": content} for role, content in said]
        rows.append({"prompt": ask, "prompt_id": f"{i:064x}", "messages": messages})
    return rows


def tldr_rows() -> list[Mapping[str, Any]]:
    """As trl-lib/tldr."""
    title = "SUBREDDIT: r/stand_ins\n\nTITLE: I tried to {0} {1}\n\n"
    head = title + "POST: Yesterday I tried to {0} {1}, and it took me all day.\n\nTL;DR:"
    return [{"prompt": head.format(*pair), "completion": " It took me all day to {} {}.".format(*pair)} for pair in pairs()]


def hh_rows() -> list[Mapping[str, Any]]:
    """As Anthropic/hh-rlhf: two transcripts that begin alike, and whose last answers may, too."""
    rows: list[Mapping[str, Any]] = []
    for deed, thing in pairs():
        talk = f"\n\nHuman: Can you {deed} {thing}?\n\nAssistant: Yes.\n\nHuman: Then do.\n\nAssistant:"
        rows.append({"chosen": f"{talk} {answer(deed, thing)}", "rejected": f"{talk} Of what use is {thing}?"})
    return rows


if __name__ == "__main__":
    main()
