"""The task of random numbers on a real model: who becomes uniform, and who collapses?

    make real-model && python benchmarks/real/random_numbers.py --out numbers

The proposal goes on with a list of whole numbers from 0 to 100. It writes valid ones, but some much more often than others (the
task is that of Hu et al., arXiv 2310.04363). The reward is 1 for a valid number, else 0. Every number is three tokens with what
follows it, and has one spelling. `tb --prior 0` has the uniform distribution as its target; `grpo` has no target but the reward
and its price of divergence. Of 10,000 samples at temperature 1 this prints the share of valid ones, how many of the 101 numbers
there are, the entropy of the valid ones (log 101 = 4.615 is the most), and Pearson's χ² against uniform with its p-value: 100
degrees of freedom. What is finished is kept in `--out`; it prints Markdown.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from demo import Parts
from opening import SEEDS, add_training, open_study
from report import table

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.files import atomic_write, only_writer
from trimtab.hardware import describe_hardware
from trimtab.train.call import train

PROMPT = "Whole numbers from 0 to 100, drawn at random: 17, 4, 88, 63, 100, 29, 0, 51, 76, 8, 35, 92, "
VALID = re.compile(r"(\d), |([1-9]\d),|(100)")
NUMBERS, TOKENS, SAMPLES, SEED = 101, 3, 10_000, 4_321
ROUNDS: dict[str, Any] = {
    "num_generations": 128, "per_device_train_batch_size": 128, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
    "eval_steps": 0.25, "save_steps": 0.25, "logging_steps": 10, "load_best_model_at_end": False,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "tb": {"objective": "tb", "beta": 0.025, "prior": 0.0},
    "grpo": {"objective": "grpo"},
}


def valid(completions: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 for a number, else 0."""
    return [float(number_of(text) is not None) for text in completions]


def number_of(text: str) -> int | None:
    """The number that an answer is."""
    found = VALID.fullmatch(text)
    return None if found is None else int(next(part for part in found.groups() if part is not None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, 400, WAYS)
    said = open_study("numbers", parser)
    with only_writer(said.out / "lock"):
        print(run(said))


def run(said: argparse.Namespace) -> str:
    """Train and measure what is missing; returns the table."""
    parts, rows, data = Parts(said.out / "parts"), [], said.out / "prompt.jsonl"
    with atomic_write(data) as stream:
        stream.write(json.dumps({"prompt": PROMPT}) + "\n")
    bare = parts.do("sample the proposal", lambda: draw(AlignedModel.from_pretrained(said.proposal, max_num_seqs=64)))
    rows.append(["proposal", *shown(bare)])
    for name in said.way or WAYS:
        for seed in said.seed or SEEDS:
            folder, label = said.out / f"{name}-{seed}", f"{name}, seed {seed}"
            how = {"proposal": str(said.proposal), "output_dir": str(folder), "head_layers": said.head_layers, "seed": seed}
            how |= {"dataset": str(data), "eval_dataset": str(data), "max_tokens": TOKENS, "max_num_seqs": 128}
            how |= {"max_steps": said.rounds, "report_to": "none"} | ROUNDS | WAYS[name]
            parts.do(f"train {label}", lambda how=how: train(reward=(valid,), **how)["metrics"])  # type: ignore[misc]
            model = lambda folder=folder: AlignedModel.from_pretrained(said.proposal, folder, max_num_seqs=64)  # noqa: E731
            rows.append([label, *shown(parts.do(f"sample {label}", lambda model=model: draw(model())))])  # type: ignore[misc]
    head = ["", "valid", "different numbers", "entropy, nats", "commonest number", "χ² of 100", "p"]
    return f"{describe_hardware()}\n\n{table(head, rows)}"


def draw(model: AlignedModel) -> dict[str, int]:
    """How often each text comes among the samples."""
    texts = model.generate([PROMPT], SamplingParams(n=SAMPLES, max_tokens=TOKENS, temperature=1.0, seed=SEED))
    return dict(Counter(one.text for one in texts))


def shown(counts: Mapping[str, int]) -> list[str]:
    """A row."""
    by_number = [0] * NUMBERS
    for text, count in counts.items():
        if (number := number_of(text)) is not None:
            by_number[number] += count
    total = sum(by_number)
    chances = [count / total for count in by_number if count]
    entropy, most = -sum(p * math.log(p) for p in chances), max(range(NUMBERS), key=lambda i: by_number[i])
    expected = total / NUMBERS
    statistic = sum((count - expected) ** 2 / expected for count in by_number)
    half = torch.tensor([(NUMBERS - 1) / 2, statistic / 2], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(half[0], half[1]))
    share = total / sum(counts.values())
    common = f"{most} ({by_number[most] / total:.3f})"
    return [f"{share:.3f}", str(len(chances)), f"{entropy:.3f}", common, f"{statistic:.0f}", f"{p_value:.2g}"]


if __name__ == "__main__":
    main()
