"""Whether samples come from a distribution."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch


def chi_square(counts: Mapping[Any, int], law: Mapping[Any, float]) -> float:
    """P-value of Pearson's goodness of fit; impossible outcomes that occur give 0, rare ones are pooled."""
    total = sum(counts.values())
    if any(count and law.get(outcome, 0.0) == 0.0 for outcome, count in counts.items()):
        return 0.0
    statistic, cells, rare_seen, rare_expected = 0.0, 0, 0.0, 0.0
    for outcome, probability in law.items():
        expected = probability * total
        if expected < 5:
            rare_seen, rare_expected = rare_seen + counts.get(outcome, 0), rare_expected + expected
        else:
            statistic, cells = statistic + (counts.get(outcome, 0) - expected) ** 2 / expected, cells + 1
    if rare_expected > 0:
        statistic, cells = statistic + (rare_seen - rare_expected) ** 2 / max(rare_expected, 1e-9), cells + 1
    if cells < 2:
        return 1.0
    freedom = torch.tensor((cells - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def law_of(logprobs: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Probabilities from log-probabilities."""
    return {outcome: float(torch.tensor(value, dtype=torch.float64).exp()) for outcome, value in logprobs.items()}


def fits(samples: Iterable[Hashable], logprobs: Mapping[Hashable, float]) -> float:
    """P-value of samples against enumerated log-probabilities."""
    return chi_square(Counter(samples), law_of(logprobs))
