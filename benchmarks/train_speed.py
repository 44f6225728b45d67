"""Training throughput: `likelihood` from a finished cache against `transformers.Trainer` doing plain SFT of the same aligner.

Same examples, batches, optimiser and precision; the two take turns, and the ratio is the median over the turns. SFT has a
collator of its own, as one would write it: whole sequences padded on the right, the prompt's labels masked. With `--contrast`,
examples are pairs, and SFT learns from both answers, as two examples of a batch twice as large: the same tokens.

    python benchmarks/train_speed.py --vocab 32000 --turns 5
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from trimtab.data.examples import Example
from trimtab.hardware import describe_hardware, keep_freed_memory
from trimtab.options import make_options
from trimtab.train.batches import ExampleDataset, collate
from trimtab.train.cache import ProposalCache
from trimtab.train.options import TrainOptions
from trimtab.train.plan import Facts, resolve
from trimtab.train.rows import CachedRows, Compressed, Layout
from trimtab.train.trainer import AlignerTrainer


class Rows:
    """A proposal whose rows are drawn at random, for what they are does not matter here."""

    fingerprint = "random"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def who(self) -> str:
        return ""

    def compress(self, examples: Any, layout: Layout, temperature: float) -> Compressed:
        generator, rows = torch.Generator().manual_seed(0), []
        for example in examples:
            shape = (len(example.chosen), layout.top_k)
            ids = torch.randint(0, self.vocab_size, (shape[0], 1), generator=generator) + torch.arange(layout.top_k)
            logp = torch.randn(shape, generator=generator).log_softmax(-1) - 0.1
            tokens = torch.tensor(example.chosen).int()
            drawn = torch.randint(0, self.vocab_size, (shape[0], layout.samples), generator=generator).int()
            rows.append(CachedRows((ids % self.vocab_size).int(), logp, tokens, logp[:, 0] - 9, logp[:, 0] * 0 - 2.4, drawn))
        return Compressed(rows, torch.zeros(4, dtype=torch.float64))


class SFTData(torch.utils.data.Dataset[Example]):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        return self.examples[i]


def sft_batch(examples: list[Example]) -> dict[str, Tensor]:
    ids = [torch.tensor(e.prompt + e.chosen) for e in examples]
    labels = [torch.tensor([-100] * len(e.prompt) + e.chosen.tolist()) for e in examples]
    ones = [torch.ones(len(row), dtype=torch.long) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="updates in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--strategy", default="random", help="train_sampling_strategy of ours")
    parser.add_argument("--samples", type=int, default=64, help="tokens drawn from the tail of a row")
    parser.add_argument("--contrast", type=float, default=0.0, help="of pairs; 0 is without")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, options.vocab, (length,), generator=generator).tolist()

    kinds = ("chosen", "rejected") if options.contrast else ("chosen",)
    count = options.batch * options.steps * 4
    examples = [Example(ids(20, 80), ids(20, 120), ids(20, 120) if options.contrast else []) for _ in range(count)]
    answered = {kind: [Example(e.prompt, getattr(e, kind), []) for e in examples] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(64, options.samples)
        caches = {
            kind: ProposalCache.build(Path(folder) / kind, Rows(options.vocab), "v", each, layout=layout)
            for kind, each in answered.items()
        }
        common = {
            "output_dir": folder, "max_steps": options.steps, "per_device_train_batch_size": options.batch, "report_to": "none",
            "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
            "bf16": options.bf16, "dataloader_pin_memory": torch.cuda.is_available(),
        }  # fmt: skip
        ours = TrainingArguments(
            **common, remove_unused_columns=False, label_names=[], train_sampling_strategy=options.strategy
        )
        theirs = TrainingArguments(
            **common | {"per_device_train_batch_size": options.batch * len(kinds)}, remove_unused_columns=False
        )
        named = {"proposal": "p", "aligner": "a", "dataset": "d", "output_dir": folder}
        said = resolve(make_options(TrainOptions, None, {**named, "contrast": options.contrast}), Facts(records=2))

        def model() -> Any:
            torch.manual_seed(0)  # noqa: TID251 - both start from the same weights
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
                    num_hidden_layers=options.layers, num_attention_heads=4, num_key_value_heads=4,
                )
            )  # fmt: skip

        mean = sum(len(e.chosen) for e in examples) / len(examples)
        one = AlignerTrainer(
            said, options.vocab, mean, model=model(), args=ours, data_collator=collate,
            train_dataset=ExampleDataset(examples, caches),
        )  # fmt: skip
        alone = [example for both in zip(*answered.values(), strict=True) for example in both]
        other = Trainer(model=model(), args=theirs, data_collator=sft_batch, train_dataset=SFTData(alone))
        seconds: dict[str, list[float]] = {"trimtab": [], "sft": []}
        for turn in range(options.turns + 1):
            for name, trainer in (("trimtab", one), ("sft", other)):
                started = time.perf_counter()
                trainer.train()
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(seconds["trimtab"], seconds["sft"], strict=True)]
    report = {
        "hardware": describe_hardware(),
        **{key: vars(options)[key] for key in ("vocab", "hidden", "layers", "batch", "strategy", "contrast", "bf16")},
        "seconds_per_step": {name: round(statistics.median(values) / options.steps, 4) for name, values in seconds.items()},
        "ratio_of_throughput": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
