"""Preference pairs from samples: the best of a prompt's samples, by a reward model, against the worst.

Such pairs are of what the sampled model says itself, so to learn from them takes less divergence than to learn from others'
answers: an aligner's second round.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from trimtab.data.records import Record
from trimtab.endpoints.completions import Sample

__all__ = ["Ranking", "Scorer"]


class Scorer(Protocol):
    """What scores answers: `trimtab.judges.reward.RewardModel` is one."""

    def score(self, prompts: Sequence[Any], answers: Sequence[str]) -> Sequence[float]:
        """A number for each prompt with its answer; higher is better."""


class Ranking(NamedTuple):
    """How the samples of a prompt become pairs."""

    scorer: Scorer
    name: str
    """What tells the scorer from others."""
    pairs: int = 1
    """Of a prompt: best and worst, second best and second worst, and so on; at most half of its samples."""
    date: str | None = None
    """The run's date, if the scorer's chat template writes it."""

    def pick(self, records: Sequence[Record], groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[Record, Sample, Sample]]:
        """Records with a wanted and an unwanted sample of each, from all of its samples that could be finished.

        Where too few could, what is lacking are pairs of one that could not.
        """
        alive = [[sample for sample in samples if sample.error is None] for samples in groups]
        prompts = [record.prompt for record, samples in zip(records, alive, strict=True) for _ in samples]
        scores, first = self.scorer.score(prompts, [sample.text for samples in alive for sample in samples]), 0
        for record, samples, drawn in zip(records, alive, groups, strict=True):
            order = sorted(range(len(samples)), key=lambda i: -scores[first + i])
            ranked, first = [samples[i] for i in order], first + len(samples)
            for i in range(self.pairs):
                if 2 * i + 1 < len(ranked):
                    yield record, ranked[i], ranked[-1 - i]
                else:
                    dead = next(sample for sample in drawn if sample.error is not None)
                    yield record, dead, dead
