"""A reward as a judge: the answer with the higher one is better."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import InvalidOption
from trimtab.journal import Journal
from trimtab.judges.base import Asked, Judge, JudgeKind, Judgement, Pair
from trimtab.judges.rewards.base import Reward, check_loaded, checked_scores
from trimtab.judges.rewards.kinds import make_reward, parse_reward
from trimtab.judges.scoring import bradley_terry, judge_by_scores

__all__ = ["REWARD", "RewardJudge"]


class RewardJudge(Judge):
    """Prefers the answer with the higher reward, by the Bradley–Terry probability σ(reward_2 − reward_1).

    Args:
        reward: what scores.
        name: what reports call it. Default: the reward's name.
    """

    kind = "reward"

    def __init__(self, reward: Reward, name: str | None = None) -> None:
        self.reward, self.name = reward, name or reward.name
        self.reads_columns, self.tokenizer = reward.reads_columns, reward.tokenizer

    def check(self, asked: Asked, where: str) -> None:
        """Refuse prompts that the reward cannot take."""
        self.reward.called = self.called or self.reward.called
        self.reward.check(asked)

    def load(self, asked: Asked, date: str) -> None:
        """Load the reward."""
        self.reward.called = self.called or self.reward.called
        self.reward.load(asked, date)
        check_loaded(self.reward)
        self.tokenizer = self.reward.tokenizer

    def judge(self, pairs: Sequence[Pair], journal: Journal) -> list[Judgement]:
        """An opinion of each pair; none where the reward gives no score."""
        known = self.reward.identity()

        def describe(pair: Pair) -> dict[str, Any]:
            read = {"columns": json.dumps(dict(pair.columns), default=str)} if self.reads_columns else {}
            return {**known, **read, "prompt": pair.prompt}

        def score(asked: list[tuple[Pair, str]]) -> Sequence[float | None]:
            pairs = [pair for pair, _ in asked]
            answers, columns = [answer for _, answer in asked], [p.columns for p in pairs]
            return checked_scores(self.name, self.reward.score([p.prompt for p in pairs], answers, columns), len(asked))

        return judge_by_scores(self.name, pairs, journal, describe, score, bradley_terry)

    def describe(self) -> Mapping[str, Any]:
        """What it is, for the record."""
        return self.reward.describe()


def _short(text: str) -> str | None:
    """A folder, or what may be a hub id, is a reward model."""
    known = Path(text).is_dir() or ("/" in text and ":" not in text and not Path(text).is_absolute())
    return f"model:{text}" if known else None


def _make(argument: str, options: Mapping[str, Any]) -> RewardJudge:
    with _named(argument):
        return RewardJudge(make_reward(argument, options))


def _reads(argument: str) -> Sequence[str]:
    with _named(argument):
        kind, rest = parse_reward(argument)
        return kind.reads(rest)


@contextmanager
def _named(argument: str) -> Iterator[None]:
    try:
        yield
    except InvalidOption as error:
        raise InvalidOption(f"--judge reward:{argument}: {error}") from error


REWARD = JudgeKind(
    "reward",
    "any --reward of `trimtab propose`, such as model:PATH or MODULE.py:FUNCTION; a folder or hub id alone is a reward model",
    _make,
    _reads,
    _short,
)
