"""Rewards: a number for one answer to one prompt, higher is better.

A user asks for one by `KIND:ARGUMENT`, and a `RewardKind` makes it; `trimtab.judges.rewards.kinds` has all kinds. Rewards rank
samples (`trimtab.propose`) and are judges (`trimtab.judges.reward`).
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from trimtab.errors import InvalidOption, ModelError
from trimtab.judges.base import Asked

__all__ = ["Reward", "RewardFunction", "RewardKind", "check_loaded", "checked_scores"]

RewardFunction: TypeAlias = Callable[..., Any]
"""TRL's `f(prompts, completions, **columns) -> list[float]`, see `trimtab.judges.rewards.function`."""


class Reward(ABC):
    """Scores answers. A run calls `check`, `load`, then `score`; what a reward needs none of it leaves as it is.

    Attributes:
        name: what results, reports and files call it.
        fingerprint: what tells it from rewards with other numbers, such as a digest; there once it is loaded. A run that is
            resumed with another one is refused, and scores that are kept are of one.
        called: what messages call it: the option and its value.
        reads_columns: whether it looks at the data's other columns.
        tokenizer: the tokenizer whose chat template it uses, once it is loaded; None without one.
        date: what its chat template writes as today's date, once it is loaded; None if it writes none.
    """

    name: str
    fingerprint: str
    called: str = ""
    reads_columns: bool = False
    tokenizer: Any = None
    date: str | None = None

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

    def identity(self) -> Mapping[str, Any]:
        """What its numbers depend on beside prompt, answer and columns, as JSON has it: kept scores are found by this."""
        return {"reward": self.fingerprint}

    def label(self) -> str:
        """The same in a line, for the description of a run that is resumed."""
        return self.fingerprint

    def describe(self) -> Mapping[str, Any]:
        """What it is, for the record, as JSON has it."""
        return {"fingerprint": self.fingerprint}


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


def checked_scores(called: str, given: Any, count: int) -> list[float | None]:
    """The scores that a reward gives, as plain numbers.

    Raises:
        ModelError: they are not one finite number, or None, for each completion.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != count:
        what = f"{len(given)} scores" if isinstance(given, (list, tuple)) else repr(given)[:80]
        raise ModelError(f"{called} must give a list of {count} scores, one for each completion, not {what}")
    scores: list[float | None] = []
    for i, value in enumerate(given):
        number = value.item() if hasattr(value, "item") else value
        if number is not None and (not isinstance(number, numbers.Real) or not math.isfinite(number)):
            raise ModelError(f"{called} gave {value!r} for completions[{i}]: a score is a finite number, or None")
        scores.append(None if number is None else float(number))
    return scores
