"""Rewards: a number for one answer to one prompt, higher is better.

A user asks for one by `KIND:ARGUMENT`, and a `RewardKind` makes it; `trimtab.judges.rewards.kinds` has all kinds. Rewards rank
samples (`trimtab.propose`) and are judges (`trimtab.judges.reward`).
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeAlias

from trimtab.errors import InvalidOption, ModelError
from trimtab.judges.base import Asked

__all__ = [
    "Failures",
    "Ids",
    "Reward",
    "RewardFunction",
    "RewardKind",
    "as_score",
    "as_values",
    "check_loaded",
    "checked_scores",
]

RewardFunction: TypeAlias = Callable[..., Any]
"""TRL's `f(prompts, completions, **columns) -> list[float]`, see `trimtab.judges.rewards.function`."""


class Ids(NamedTuple):
    """Prompts and answers as token ids; an answer that came to its end has an end of sequence last."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Failures:
    """What went wrong with completions where that is not to end the run.

    Attributes:
        count: how often something did.
        first: what it was the first time.
    """

    count: int = 0
    first: str = ""

    def plus(self, other: "Failures") -> "Failures":
        """These, and then others."""
        return Failures(self.count + other.count, self.first or other.first)


class Reward(ABC):
    """Scores answers. A run calls `check`, `load`, `score`, and `close`; what a reward needs none of it leaves as it is.

    Attributes:
        name: what results, reports and files call it.
        fingerprint: what tells it from rewards with other numbers, such as a digest; there once it is loaded. A run that is
            resumed with another one is refused, and scores that are kept are of one.
        called: what messages call it: the option and its value.
        reads_columns: whether it looks at the data's other columns.
        tokenizer: the tokenizer whose chat template it uses, once it is loaded; None without one.
        date: what its chat template writes as today's date, once it is loaded; None if it writes none.
        failures: what has gone wrong with completions so far, which were given no score for it.
    """

    name: str
    fingerprint: str
    called: str = ""
    reads_columns: bool = False
    tokenizer: Any = None
    date: str | None = None
    failures: Failures = Failures()

    def check(self, asked: Asked) -> None:  # noqa: B027 - not every reward has to
        """Refuse prompts that it could not score answers to, before anything is loaded.

        Raises:
            DataError, InvalidOption: naming the place in the data.
        """

    def load(self, asked: Asked, date: str) -> None:  # noqa: B027 - not every reward has to
        """Load what it needs, and refuse prompts that only this can tell of.

        Args:
            asked: what answers will be to.
            date: what chat templates take for today, `YYYY-MM-DD`.

        Raises:
            ModelError, DataError: it cannot be loaded, or cannot take a prompt.
        """

    @abstractmethod
    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """A finite number for each prompt with its answer; None for no score.

        Args:
            prompts: texts or chats.
            answers: a text for each.
            columns: what else the data have of each prompt; empty where `reads_columns` is false.

        Raises:
            ModelError, DataError: it fails, or gives no such numbers.
        """

    def score_drawn(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]], ids: Ids
    ) -> Sequence[float | None]:
        """What `score` gives, of answers that were drawn as token ids; some rewards read those, see `TokenReward`.

        Args:
            prompts: texts or chats.
            answers: a text for each.
            columns: as in `score`.
            ids: of the same prompts and answers.

        Raises:
            ModelError, DataError: as `score`.
        """
        return self.score(prompts, answers, columns)

    def check_tokenizer(self, tokenizer: Any) -> None:  # noqa: B027 - most rewards read texts
        """Refuse token ids of another tokenizer's than it can read, once it is loaded.

        Raises:
            VocabularyMismatch: it reads ids, and these mean other tokens.
        """

    def identity(self) -> Mapping[str, Any]:
        """What its numbers depend on beside prompt, answer and columns, as JSON has it: kept scores are found by this."""
        return {"reward": self.fingerprint}

    def label(self) -> str:
        """The same in a line, for the description of a run that is resumed."""
        return self.fingerprint

    def describe(self) -> Mapping[str, Any]:
        """What it is, for the record, as JSON has it."""
        return {"fingerprint": self.fingerprint}

    def close(self) -> None:  # noqa: B027 - not every reward has to
        """Let go of what it holds, such as processes; it may be called again, and `score` after it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@dataclass(frozen=True)
class RewardKind:
    """A kind of reward: how `KIND:ARGUMENT` becomes one.

    Attributes:
        name: the `KIND`.
        help: one line for `--help`: what `ARGUMENT` is, and what scores.
        make: from the argument, and the options that it reads by name, a reward. It checks both, and loads no model. It raises
            `InvalidOption` or `DataError` for what cannot be.
        reads: which of the options `dtype`, `device` and `date` a reward of this argument reads.
    """

    name: str
    help: str
    make: Callable[[str, Mapping[str, Any]], Reward]
    reads: Callable[[str], Sequence[str]] = lambda argument: ()


def check_loaded(reward: Reward) -> None:
    """Refuse a reward that does not say, once it is loaded, what tells it from others.

    Raises:
        InvalidOption: naming what is missing.
    """
    for what in ("name", "fingerprint"):
        if not isinstance(getattr(reward, what, None), str):
            raise InvalidOption(
                f"--reward: {type(reward).__name__} needs a text '{what}', see trimtab.judges.rewards.base.Reward"
            )


def as_values(given: Any, count: int) -> Sequence[Any]:
    """What a reward gives, as so many values.

    Raises:
        ValueError: it is no list of them; says so in words that follow what the reward is called.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != count:
        what = _counted(len(given)) if isinstance(given, (list, tuple)) else repr(given)[:80]
        raise ValueError(f"must give a list of {_counted(count)}, one for each completion, not {what}")
    return given


def as_score(value: Any) -> float | None:
    """A value as a plain number, or None for no score.

    Raises:
        ValueError: it is neither.
    """
    try:
        number = value.item() if hasattr(value, "item") else value
        if number is None:
            return None
        if isinstance(number, numbers.Real) and math.isfinite(number):
            return float(number)
    except (ValueError, RuntimeError, OverflowError):  # a tensor of several numbers, or an integer that no float holds
        pass
    raise ValueError("a score is a finite number, or None")


def checked_scores(called: str, given: Any, count: int) -> list[float | None]:
    """The scores that a reward gives, as plain numbers.

    Raises:
        ModelError: they are not one finite number, or None, for each completion.
    """
    try:
        values = as_values(given, count)
    except ValueError as error:
        raise ModelError(f"{called} {error}") from None
    scores: list[float | None] = []
    for i, value in enumerate(values):
        try:
            scores.append(as_score(value))
        except ValueError as error:
            raise ModelError(f"{called} gave {repr(value)[:80]} for completions[{i}]: {error}") from None
    return scores


def _counted(count: int) -> str:
    return f"{count} score{'s' * (count != 1)}"
