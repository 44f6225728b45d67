"""Preference pairs from samples: the best of a prompt's samples, by a reward, against the worst.

Such pairs are of what the sampled model says itself, so to learn from them takes less divergence than to learn from others'
answers: an aligner's second round.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trimtab.data.records import Record
from trimtab.endpoints.completions import Sample
from trimtab.judges.rewards.base import Reward, checked_scores

__all__ = ["Ranking"]


class Ranking(NamedTuple):
    """How the samples of a prompt become pairs."""

    reward: Reward
    """What scores them; loaded."""
    pairs: int = 1
    """Of a prompt: best and worst, second best and second worst, and so on; at most half of its samples."""

    def pick(self, records: Sequence[Record], groups: Sequence[Sequence[Sample]]) -> Iterator[tuple[Record, Sample, Sample]]:
        """Records with a wanted and an unwanted sample of each, from its samples that could be finished and have a score.

        Where too few are such, what is lacking are pairs of one that is not.
        """
        alive = [[sample for sample in samples if sample.error is None] for samples in groups]
        asked = [(record, sample) for record, samples in zip(records, alive, strict=True) for sample in samples]
        columns = [record.columns for record, _ in asked]
        called = self.reward.called or f"the reward '{self.reward.name}'"
        given = self.reward.score([record.prompt for record, _ in asked], [one.text for _, one in asked], columns)
        scores = iter(checked_scores(called, given, len(asked)))
        for record, samples, drawn in zip(records, alive, groups, strict=True):
            scored = [(score, sample) for sample in samples if (score := next(scores)) is not None]
            ranked = [sample for _, sample in sorted(scored, key=lambda one: -one[0])]
            for i in range(self.pairs):
                if 2 * i + 1 < len(ranked):
                    yield record, ranked[i], ranked[-1 - i]
                else:
                    none = Sample("", False, f"{self.reward.called or self.reward.name} gives no score to enough samples")
                    dead = next((sample for sample in drawn if sample.error is not None), none)
                    yield record, dead, dead
