"""What judges that score one answer at a time share: every answer is scored once, and two scores are a preference."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.journal import Journal, key_of
from trimtab.judges.base import Judgement, Pair

__all__ = ["bradley_terry", "judge_by_scores"]

logger = logging.getLogger(__name__)

CHUNK = 256
"""Answers that are scored between two writes."""

Score = Callable[[list[tuple[Pair, str]]], Sequence[float | None]]


def judge_by_scores(
    name: str,
    pairs: Sequence[Pair],
    journal: Journal,
    describe: Callable[[Pair], Mapping[str, Any]],
    score: Score,
    prefer: Callable[[float, float], float],
) -> list[Judgement]:
    """Score every answer that has no score yet, each once, and compare.

    Args:
        name: for lines of progress.
        pairs: what to compare.
        journal: where scores are kept.
        describe: what the score of an answer depends on beside the answer.
        score: a score for each of some pairs with one of their answers; None where there is none.
        prefer: from two scores a preference.
    """
    keys = [[key_of({**describe(pair), "answer": text}) for text in (pair.output_1, pair.output_2)] for pair in pairs]
    answers = {
        key: (pair, text)
        for pair, both in zip(pairs, keys, strict=True)
        for key, text in zip(both, (pair.output_1, pair.output_2), strict=True)
        if journal.get(key) is None
    }
    missing = list(answers.items())
    for start in range(0, len(missing), CHUNK):
        part = missing[start : start + CHUNK]
        scores = score([asked for _, asked in part])
        journal.add_all({key: {"score": value} for (key, _), value in zip(part, scores, strict=True)})
        logger.info("%s: scored %d of %d answers", name, start + len(part), len(missing))
    judgements = []
    for first, second in keys:
        one, other = journal[first]["score"], journal[second]["score"]
        if one is None or other is None:
            judgements.append(Judgement(None, why_missing=f"{name} gives no score"))
        else:
            judgements.append(Judgement(prefer(one, other), scores=(one, other)))
    return judgements


def bradley_terry(score_1: float, score_2: float) -> float:
    """1 + σ(score_2 − score_1), from 1 (the first answer wins) to 2 (the second does); 1.5 is a tie.

    The excess over 1 is the probability that the second answer is preferred, by Bradley and Terry (1952), "Rank analysis of
    incomplete block designs", if the scores are log-strengths, which is how reward models are trained.
    """
    gap = score_2 - score_1
    return 1 + 1 / (1 + math.exp(-gap)) if gap >= 0 else 1 + math.exp(gap) / (1 + math.exp(gap))
