"""Several rewards as one: their weighted sum."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import InvalidOption
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Failures, Ids, Reward, check_loaded, checked_scores
from trimtab.options import Range

__all__ = ["CombinedReward", "combine"]

FINITE = Range(above=-math.inf, below=math.inf)


class CombinedReward(Reward):
    """Σ wᵢ·rᵢ of the scores rᵢ of several rewards; None where one of them gives none.

    Args:
        parts: the rewards.
        weights: a finite number for each. Default: 1 for each.

    Attributes:
        parts: the rewards.
        weights: their weights.
        part_names: their names; of several that are called alike, the later ones have a number behind it.

    Raises:
        InvalidOption: there are no rewards, not as many weights, or a weight is not finite.
    """

    def __init__(self, parts: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(parts) if weights is None else weights
        if not parts:
            raise InvalidOption("there is no reward to combine")
        if len(weights) != len(parts):
            raise InvalidOption(f"there must be a weight for each reward: {len(parts)}, not {len(weights)}")
        for weight in weights:
            if not FINITE.holds(weight):
                raise InvalidOption(f"the weight of a reward must be a finite number, not {weight!r}")
        self.parts, self.weights = tuple(parts), tuple(float(weight) for weight in weights)
        self.part_names = _different([part.name for part in parts])
        self.name = "+".join(self.part_names)
        self.called = " and ".join(part.called or f"the reward {part.name}" for part in parts)
        self.reads_columns = any(part.reads_columns for part in parts)
        self._take()

    def check(self, asked: Asked) -> None:
        """Refuse what one of them refuses."""
        for part in self.parts:
            part.check(asked)

    def load(self, asked: Asked, date: str) -> None:
        """Load them all."""
        for part in self.parts:
            part.load(asked, date)
            check_loaded(part)
        self._take()

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """The weighted sums."""
        return self.sum_of(self.parts_of(prompts, answers, columns))

    def score_drawn(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]], ids: Ids
    ) -> Sequence[float | None]:
        """The weighted sums, some of what the ids are worth."""
        return self.sum_of(self.parts_of(prompts, answers, columns, ids))

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse what one of them refuses."""
        for part in self.parts:
            part.check_tokenizer(tokenizer)

    def parts_of(
        self,
        prompts: Sequence[Any],
        answers: Sequence[str],
        columns: Sequence[Mapping[str, Any]],
        ids: Ids | None = None,
    ) -> list[list[float | None]]:
        """The scores that each of them gives, without its weight; `sum_of` makes what `score` gives of them.

        Args:
            prompts: texts or chats.
            answers: a text for each.
            columns: as in `score`.
            ids: of the same prompts and answers, if these were drawn as ids.

        Raises:
            ModelError, DataError: one of them fails, or gives no such numbers.
        """
        found = []
        for part in self.parts:
            asked = (prompts, answers, columns)
            given = part.score(*asked) if ids is None else part.score_drawn(*asked, ids)
            found.append(checked_scores(part.called or f"the reward {part.name}", given, len(prompts)))
            self._count()
        return found

    def sum_of(self, scores: Sequence[Sequence[float | None]]) -> list[float | None]:
        """The weighted sums of the parts' scores."""
        return [self._sum(row) for row in zip(*scores, strict=True)]

    def identity(self) -> dict[str, Any]:
        """Theirs, and the weights."""
        parts = [dict(part.identity()) for part in self.parts]
        return {"reward": self.fingerprint, "parts": parts, "weights": list(self.weights)}

    def label(self) -> str:
        """Theirs, with the weights."""
        return " + ".join(f"{weight!r}*({part.label()})" for part, weight in zip(self.parts, self.weights, strict=True))

    def describe(self) -> dict[str, Any]:
        """What they are, for the record."""
        named = zip(self.part_names, self.weights, self.parts, strict=True)
        return {"sum_of": [{"name": name, "weight": weight, **part.describe()} for name, weight, part in named]}

    def close(self) -> None:
        """Let go of what they hold."""
        for part in self.parts:
            part.close()

    def _sum(self, scores: Sequence[float | None]) -> float | None:
        terms = [weight * score for weight, score in zip(self.weights, scores, strict=True) if score is not None]
        return sum(terms) if len(terms) == len(self.parts) else None

    def _take(self) -> None:
        """What they have once they are loaded; some have it before."""
        known = [getattr(part, "fingerprint", None) for part in self.parts]
        if None not in known:
            text = json.dumps([*zip(self.weights, known, strict=True)])
            self.fingerprint = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        self.tokenizer = next((part.tokenizer for part in self.parts if part.tokenizer is not None), None)
        self.date = next((part.date for part in self.parts if part.date is not None), None)
        self._count()

    def _count(self) -> None:
        self.failures = Failures()
        for part in self.parts:
            self.failures = self.failures.plus(part.failures)


def combine(rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> Reward:
    """The weighted sum of rewards; one alone with the weight 1 stays what it is.

    Raises:
        InvalidOption: as `CombinedReward`.
    """
    combined = CombinedReward(rewards, weights)
    return combined.parts[0] if combined.weights == (1.0,) else combined


def _different(names: Sequence[str]) -> tuple[str, ...]:
    """The names, made to differ."""
    found: list[str] = []
    for name in names:
        again = sum(1 for other in names[: len(found)] if other == name)
        found.append(f"{name}#{again + 1}" if again else name)
    return tuple(found)
