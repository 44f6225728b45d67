"""Judges that score one answer at a time: a reward model, or a metric that compares with a reference."""

import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from trimtab.journal import Journal, key_of
from trimtab.judges import references, reward
from trimtab.judges.base import Judgement, Pair

__all__ = ["ReferenceJudge", "RewardJudge"]

logger = logging.getLogger(__name__)

CHUNK = 256
"""Answers that are scored between two writes."""

Score = Callable[[list[tuple[Pair, str]]], list[float]]


class RewardJudge:
    """Prefers the answer with the higher reward, by the Bradley–Terry probability σ(reward_2 − reward_1).

    Args:
        model: the reward model.
        name: what reports call it.
    """

    kind = "reward"

    def __init__(self, model: reward.RewardModel, name: str) -> None:
        self.model, self.name = model, name
        self._fingerprint = model.fingerprint

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        return {"weights": self._fingerprint, "max_length": self.model.max_length, **self.model.chat_settings}

    def cost(self) -> None:
        """None: it runs here."""

    def judge(self, pairs: Sequence[Pair], journal: Journal) -> list[Judgement]:
        """An opinion of each pair."""
        known = {"reward": self._fingerprint, "max_length": self.model.max_length, **self.model.chat_settings}

        def score(asked: list[tuple[Pair, str]]) -> list[float]:
            return self.model.score([pair.prompt for pair, _ in asked], [answer for _, answer in asked])

        return _judge(self.name, pairs, journal, lambda pair: {**known, "prompt": pair.prompt}, score, reward.preference)


class ReferenceJudge:
    """Prefers the answer that is closer to the reference; pairs without one have no preference.

    Args:
        metric: how close.
    """

    kind = "reference"

    def __init__(self, metric: references.ReferenceMetric) -> None:
        self.metric, self.name = metric, metric.name

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        package = "sacrebleu" if self.name == "chrf" else "rouge_score"
        version = f"{package} {metadata.version(package)}"
        return {"metric": self.metric.name, "tokenizer": self.metric.tokenizer, "package": version}

    def cost(self) -> None:
        """None: it runs here."""

    def judge(self, pairs: Sequence[Pair], journal: Journal) -> list[Judgement]:
        """An opinion of each pair."""
        known = {"metric": self.metric.name, "tokenizer": self.metric.tokenizer}

        def score(asked: list[tuple[Pair, str]]) -> list[float]:
            return self.metric.score([answer for _, answer in asked], [pair.reference or "" for pair, _ in asked])

        whole = [(pair.reference or "").strip() != "" for pair in pairs]
        known_pairs = [pair for pair, has_one in zip(pairs, whole, strict=True) if has_one]
        judged = _judge(
            self.name, known_pairs, journal, lambda pair: {**known, "to": pair.reference}, score, references.preference
        )
        found = iter(judged)
        return [next(found) if has_one else Judgement(None, why_missing="no reference") for has_one in whole]


def _judge(
    name: str,
    pairs: Sequence[Pair],
    journal: Journal,
    describe: Callable[[Pair], dict[str, Any]],
    score: Score,
    prefer: Callable[[float, float], float],
) -> list[Judgement]:
    """Score every answer that has no score yet, each once, and compare."""
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
        judgements.append(Judgement(prefer(one, other), scores=(one, other)))
    return judgements
