"""What systems say, judged: win rates against the proposal at the same divergence from it, and what tells good from gamed.

A system's strength is set on development prompts, so that its samples there have the wanted KL from the proposal in nats a
token; on held-out prompts the KL is measured again and reported beside the win rate.
"""

import itertools
import math
from typing import Any

import torch
from judge import Judge
from systems import Samples, System, sample
from torch import Tensor

__all__ = ["ANSWERS", "CUT", "OF", "Contest", "best_of", "kl_per_token", "match"]

CUT = 64
"""Most tokens of an answer: as many as the judge reads."""

ANSWERS = 6
"""Answers to each held-out prompt."""

OF = 8
"""Answers that best-of-n chooses from."""

STEPS = 6
CLOSE = 0.08
"""A strength is good enough where the KL is so near to what is wanted, as a share of it."""


def kl_per_token(samples: Samples) -> float:
    """Nats."""
    return float(samples.kl.sum()) / sum(map(len, samples.tokens))


def match(system: System, most: float, target: float, prompts: list[list[int]]) -> float:
    """The strength, at most `most`, at which samples are `target` nats a token from the proposal: the closest one tried.

    KL grows like a power of the strength: at first as the square, and from then on as between the two nearest that were tried.
    """
    strength, power = min(1.0, most), 2.0
    tried: dict[float, float] = {}  # log KL / target at each strength
    for _ in range(STEPS):
        found = kl_per_token(sample(system.at(strength), prompts, n=2, max_tokens=CUT, seed=7))
        tried[strength] = math.log(max(found, 1e-9) / target)
        best, *others = sorted(tried, key=lambda one: abs(tried[one]))
        if abs(tried[best]) < math.log1p(CLOSE) or (strength == most and found < target):
            break
        if others:
            power = (tried[best] - tried[others[0]]) / math.log(best / others[0])
        strength = min(most, best * math.exp(-tried[best] / min(max(power, 1.0), 8.0)))
    return best


class Contest:
    """The proposal's answers to some prompts, and a judge that compares others with them.

    Args:
        proposal: the bare one.
        prompts: token ids.
        judge: who scores answers.
    """

    def __init__(self, proposal: System, prompts: list[list[int]], judge: Judge) -> None:
        self._proposal, self._prompts, self._judge = proposal, prompts, judge
        self._base = self._scores(sample(proposal, prompts, n=ANSWERS, max_tokens=CUT, seed=11).tokens)

    def null(self) -> dict[str, Any]:
        """The proposal against itself with another seed."""
        return self.hold(self._proposal)

    def hold(self, system: System) -> dict[str, Any]:
        """What a system wins, for each prompt, and what its answers are like."""
        return self.report(sample(system, self._prompts, n=ANSWERS, max_tokens=CUT, seed=12), ANSWERS)

    def report(self, samples: Samples, n: int) -> dict[str, Any]:
        """The same of answers that are there: n to each prompt."""
        scores = self._scores(samples.tokens, n)
        wins = (torch.sign(scores.unsqueeze(2) - self._base.unsqueeze(1)) + 1) / 2
        tokens = samples.tokens
        pairs = [pair for one in tokens for pair in itertools.pairwise(one)]
        return {
            "wins": wins.mean((1, 2)).tolist(),
            "kl": samples.kl.view(-1, n).sum(1).tolist(),
            "tokens": [sum(map(len, tokens[i : i + n])) for i in range(0, len(tokens), n)],
            "distinct_pairs": len(set(pairs)) / len(pairs),
            "repeats": sum(token in one[max(0, i - 16) : i] for one in tokens for i, token in enumerate(one))
            / sum(map(len, tokens)),
            "ended": sum(len(one) < CUT for one in tokens) / len(tokens),
            "seconds": samples.seconds,
        }

    def _scores(self, answers: list[list[int]], n: int = ANSWERS) -> Tensor:
        """`[prompts, n]`."""
        repeated = [prompt for prompt in self._prompts for _ in range(n)]
        return self._judge.score(repeated, answers).view(-1, n)


def best_of(proposal: System, prompts: list[list[int]], reward: Judge) -> Samples:
    """The best of `OF` of the proposal's answers by a reward model, `ANSWERS` times over.

    What is said of its KL is a bound: log n − (n−1)/n nats for a whole answer (Beirami et al., arXiv 2401.01879).
    """
    pool = sample(proposal, prompts, n=OF * ANSWERS, max_tokens=CUT, seed=13)
    scores = reward.score([prompt for prompt in prompts for _ in range(OF * ANSWERS)], pool.tokens).view(-1, OF)
    best = scores.argmax(1) + torch.arange(len(scores)) * OF
    bound = math.log(OF) - (OF - 1) / OF
    return Samples([pool.tokens[i] for i in best.tolist()], torch.full((len(best),), bound, dtype=torch.float64), pool.seconds)
