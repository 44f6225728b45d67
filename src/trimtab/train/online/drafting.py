"""A drafter for an aligner that rewards have trained, from what it says itself: the samples of its last rounds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.examples import Example
from trimtab.models.adapter_folder import Base
from trimtab.models.head import Head
from trimtab.train.batches import ExampleDataset
from trimtab.train.caches import open_caches
from trimtab.train.draft import CHECKPOINTS, train_draft
from trimtab.train.head_draft import train_head_draft
from trimtab.train.online.rounds import Rounds
from trimtab.train.online.samples import Prompt, Sample
from trimtab.train.plan import Plan
from trimtab.train.ranks import Ranks
from trimtab.train.rows import ModelRows

__all__ = ["distil_draft"]

SAMPLES = 2048
"""At most so many, the latest ones."""


def distil_draft(
    plan: Plan,
    output: Path,
    tokenizer: Any,
    ranks: Ranks,
    *,
    rounds: Rounds,
    report: Mapping[str, Any],
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    source: ModelRows,
    start: Base | None,
    head: Head | None,
) -> dict[str, Any]:
    """Distil a drafter into the finished aligner's folder.

    Args:
        plan: of the run.
        output: the aligner's folder.
        tokenizer: of both.
        ranks: one process.
        rounds: of the run.
        report: of the aligner's training.
        prompts: of training, and of development.
        source: the proposal's rows.
        start: what it starts from; None for a head.
        head: what a head's manifest says.

    Returns:
        The drafter's report.
    """
    learning_rate, weight = report["learning_rate"], report["weight"]
    if head is not None:
        parts = tuple([Example(prompt.ids, (), ()) for prompt in some] for some in prompts)
        return train_head_draft(plan, output, output / CHECKPOINTS, head, tokenizer, (parts[0], parts[1]), ranks, learning_rate)
    assert start is not None  # as for all but heads
    latest: list[Sample] = []
    for number in reversed(range(report["rounds"])):
        drawn = rounds.read(number) or []
        latest += drawn or [sample for group in rounds.groups(number, drawn) for sample in group]
        if len(latest) >= SAMPLES:
            break
    examples = [Example(prompts[0][one.place].ids, one.tokens, ()) for one in latest[:SAMPLES]]
    development = [Example(prompts[1][one.place].ids, one.tokens, ()) for one in rounds.read_look(report["best_round"])]
    caches = open_caches(plan, source, tokenizer, examples, development, ranks)
    data = {
        "train_dataset": ExampleDataset(examples, caches["train"]),
        "eval_dataset": ExampleDataset(development, caches["dev"]),
    }
    mean_length = sum(len(example.chosen) for example in examples) / len(examples)
    return train_draft(plan, output, tokenizer, ranks, start, weight, mean_length, learning_rate, data)
