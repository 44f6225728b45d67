"""Whether a round's aligner is better than the incumbent, on prompts that no round has trained on.

*By votes.* A model's odds of a vote are log P(preferred) − log P(other), decoded as it is. The newcomer wins a vote where its
odds are higher than the incumbent's. Prompts are what is drawn: a prompt's votes are one result, between 0 and 1. So if a round
has learnt nothing, each prompt is a fair coin, and an exact interval of the share that is won says more.

*By a reward.* Both answer the prompts of the pool that are held out, with the same seeds; a win is an answer of a higher
reward, an equal one is half.

A newcomer is promoted if the interval is above 1/2. The chance that a loop ever promotes what is no better is α: round r tests
at 6α / (π² r²), which adds up to α over all rounds. Not promoted, whatever the interval says, is an aligner under which wanted
answers have become significantly less likely than they may (`max_nll_loss`): odds rise, too, where both answers fall.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from trimtab.core.intervals import sign_interval
from trimtab.data.records import Record
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.pairs import Pair, encode_pairs
from trimtab.decode.request import SamplingParams
from trimtab.evaluate.intervals import ratio_interval
from trimtab.judges.rewards.base import Reward, checked_scores

__all__ = ["Answers", "Odds", "answers_of", "compare_answers", "compare_odds", "level_of", "odds_of", "verdict_of"]

TOGETHER = 64
"""Answers that are scored at once."""


class Odds(NamedTuple):
    """What a model says of a vote."""

    odds: float
    """log P(preferred) − log P(other)."""
    nll: float
    """Of the preferred answer, summed over its tokens."""
    tokens: int
    """Of the preferred answer."""


class Answers(NamedTuple):
    """What a model answers."""

    texts: list[str]
    scores: list[float | None]


def odds_of(model: AlignedModel, records: Sequence[Record]) -> dict[int, Odds]:
    """A model's odds of votes, by their places; those are left out that it cannot say, or that do not fit into its context."""
    pairs, of = encode_pairs(records, model, leave_out_long=True)
    places = {id(record): place for place, record in enumerate(records)}
    wanted, other = (_sums(model, pairs, which) for which in ("chosen", "rejected"))
    return {
        places[id(record)]: Odds(a - b, -a, len(pair.chosen))
        for record, pair, a, b in zip(of, pairs, wanted, other, strict=True)
        if math.isfinite(a) and math.isfinite(b)
    }


def answers_of(model: AlignedModel, records: Sequence[Record], reward: Reward, params: Sequence[SamplingParams]) -> Answers:
    """A model's answers to prompts, and what they are worth."""
    prompts = [record.prompt for record in records]
    drawn = model.generate(prompts, list(params))
    alive = [i for i, one in enumerate(drawn) if one.error is None]
    columns = [records[i].columns for i in alive]
    given = reward.score([prompts[i] for i in alive], [drawn[i].text for i in alive], columns)
    scores = dict(zip(alive, checked_scores(reward.called or reward.name, given, len(alive)), strict=True))
    return Answers([one.text for one in drawn], [scores.get(i) for i in range(len(drawn))])


def compare_odds(
    new: Sequence[Odds], old: Sequence[Odds], votes: Sequence[Record], groups: Sequence[str], level: float, seed: int = 0
) -> dict[str, Any]:
    """The share of votes that the newcomer wins, with its interval, and what wanted answers cost it more.

    Args:
        new: the newcomer's odds.
        old: the incumbent's, of the same votes.
        votes: with their weights.
        groups: which prompt each vote is of.
        level: of the interval of the share; the other one is at .95.
        seed: for the bootstrap of the other one.
    """
    wins = [(a.odds > b.odds) + (a.odds == b.odds) / 2 for a, b in zip(new, old, strict=True)]
    found = _share(wins, [vote.weight for vote in votes], groups, level)
    more = [(a.nll - b.nll) * vote.weight for a, b, vote in zip(new, old, votes, strict=True)]
    sizes = [one.tokens * vote.weight for one, vote in zip(new, votes, strict=True)]
    totals = [torch.tensor(_grouped(values, groups), dtype=torch.float64) for values in (more, sizes)]
    loss = {"nll_more": float(totals[0].sum() / totals[1].sum()), "nll_more_interval": list(ratio_interval(*totals, seed=seed))}
    return {"votes": len(votes), **found, **loss}


def compare_answers(new: Answers, old: Answers, groups: Sequence[str], level: float) -> dict[str, Any]:
    """The share of prompts at which the newcomer's answer is worth more; those without two scores are left out."""
    both = [(a, b, g) for a, b, g in zip(new.scores, old.scores, groups, strict=True) if a is not None and b is not None]
    found = _share([(a > b) + (a == b) / 2 for a, b, _ in both], [1.0] * len(both), [g for _, _, g in both], level)
    means = {name: _mean(some.scores) for name, some in (("reward", new), ("reward_before", old))}
    return {**found, **means, "without_score": len(groups) - len(both)}


def level_of(number: int, false_promotions: float) -> float:
    """At which level a round's interval is: both of its ends miss with the chance 6α / (π² r²) each."""
    return 1 - 2 * 6 * false_promotions / (math.pi**2 * number**2)


def verdict_of(found: dict[str, Any], level: float, max_nll_loss: float) -> tuple[bool, str]:
    """Whether to promote, and why, or why not."""
    low, high = found["interval"]
    what = f"{found['won']:.3f} won [{low:.3f}, {high:.3f}] of {found['prompts']} held-out prompts"
    fewest = math.ceil(math.log2(2 / (1 - level)))
    if found["prompts"] < fewest:
        return False, f"kept: {what}; fewer than {fewest} can tell nothing at this level"
    if "nll_more" in found and found["nll_more_interval"][0] > max_nll_loss:
        low = found["nll_more_interval"][0]
        return False, f"kept: wanted answers cost {found['nll_more']:.3f} nats a token more, at least {low:.3f} (max_nll_loss)"
    if low > 0.5:
        return True, f"promoted: {what}"
    return False, f"kept: {what}, {'significantly worse' if high < 0.5 else 'not significantly more than half'}"


def _share(wins: Sequence[float], weights: Sequence[float], groups: Sequence[str], level: float) -> dict[str, Any]:
    """The weighted share of wins over prompts, and its exact interval."""
    heavy = _grouped(weights, groups)
    won = sum(_grouped([win * weight for win, weight in zip(wins, weights, strict=True)], groups))
    total, squares = sum(heavy), sum(weight**2 for weight in heavy)
    interval = list(sign_interval(won, total, squares, level=level))
    return {"won": won / total if total else 0.5, "interval": interval, "level": level, "prompts": len(heavy)}


def _grouped(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    """Sums by group."""
    sums: dict[str, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value
    return list(sums.values())


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def _sums(model: AlignedModel, pairs: Sequence[Pair], which: str) -> list[float]:
    """Log-probabilities of the `which` answers under the aligned model."""
    sums: list[float] = []
    for start in range(0, len(pairs), TOGETHER):
        some = pairs[start : start + TOGETHER]
        scores = model.score([list(pair.prompt) for pair in some], [list(getattr(pair, which)) for pair in some])
        sums += [sum(score.aligned) for score in scores]
    return sums
