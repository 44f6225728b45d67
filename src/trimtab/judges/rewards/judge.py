"""A judge behind an OpenAI-compatible endpoint as a reward: it grades each answer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.data.prompts import show_prompt
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.reach import reach
from trimtab.endpoints.sendable import check_sendable
from trimtab.endpoints.settings import Limits, base_url, without_password
from trimtab.errors import EndpointError, InvalidOption, ModelError
from trimtab.files import json_digest
from trimtab.judges.base import Asked
from trimtab.judges.dialect import Dialect
from trimtab.judges.rewards.base import Failures, Reward, RewardKind
from trimtab.judges.rewards.grades import RUBRICS, grade_messages, read_grade
from trimtab.judges.rewards.keyed import number, read_keyed

__all__ = ["JUDGE", "JudgeReward"]

logger = logging.getLogger(__name__)

PATH = "/v1/chat/completions"

KEYS = ("criterion", "max_tokens", "concurrency", "request_timeout", "max_retries")

MAX_TOKENS = 4
"""Of an answer: room for a quote or a line break before the grade."""

CONCURRENCY = 8
"""Questions at once, by default."""

TRIES = 3
"""How often a question is asked whose answer has no grade."""


class JudgeReward(Reward):
    """The grade that a model gives an answer, from 0 to 1.

    Args:
        url: where it is, with `/v1` or without.
        model: its name there; None takes the first that is listed.
        criterion: one of `RUBRICS`.
        max_tokens: room for its answer; a model that thinks before it names a grade needs more.
        limits: how much to ask at once, how long to wait, how often to try again.

    Raises:
        InvalidOption: the URL is none, the criterion does not exist, or `max_tokens` is below 1.
    """

    name = "judge"

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        criterion: str = "helpful",
        max_tokens: int = MAX_TOKENS,
        limits: Limits | None = None,
    ) -> None:
        if criterion not in RUBRICS:
            raise InvalidOption(f"judge: criterion must be one of {', '.join(RUBRICS)}, not '{criterion}'")
        if max_tokens < 1:
            raise InvalidOption(f"judge: max_tokens must be at least 1, not {max_tokens}")
        base_url(url)
        self._url, self._model, self._criterion = url, model, criterion
        self._limits, self._dialect = limits or Limits(concurrency=CONCURRENCY), Dialect(max_tokens)
        self._answered = self._graded = False

    def check(self, asked: Asked) -> None:
        """Refuse prompts that cannot be sent.

        Raises:
            DataError: naming the place in the data.
        """
        check_sendable(asked.prompts, asked.sources)

    def load(self, asked: Asked, date: str) -> None:
        """See whether the endpoint answers, and ask it for the model's name if none was given.

        Raises:
            EndpointError: it does not.
        """
        self._model = reach(self._url, self._model, self._limits)
        self.fingerprint = f"sha256:{json_digest([[self._model, grade_messages(self._criterion, '', '')]])}"

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """The grades; None, which is counted in `failures`, where the judge names none for some of its answers.

        Raises:
            ModelError: a question is refused, or cannot be asked; names the answer.
            DataError: an answer cannot be sent.
        """
        check_sendable(answers, [self._said] * len(answers), "an answer")
        asked = [grade_messages(self._criterion, show_prompt(p), text) for p, text in zip(prompts, answers, strict=True)]
        grades: list[float | None] = [None] * len(asked)
        left = list(range(len(asked)))
        with Endpoints([self._url], self._limits) as endpoints:
            for _ in range(TRIES):
                found = self._ask(endpoints, [asked[place] for place in left], [answers[place] for place in left])
                for place, grade in zip(left, found, strict=True):
                    grades[place] = grade
                left = [place for place in left if grades[place] is None]
        if left:
            why = f"{self._said} named no grade for the answer {answers[left[0]][:80]!r}"
            if len(left) == len(asked) and not self._graded:
                raise ModelError(f"{why}, nor for any before: let it write more with max_tokens=…, or ask another model")
            self.failures = self.failures.plus(Failures(len(left), why))
        self._graded = self._graded or len(left) < len(asked)
        return grades

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        known = {"url": without_password(base_url(self._url)), "model": self._model, "criterion": self._criterion}
        return known | self._dialect.fields

    @property
    def _said(self) -> str:
        return self.called or self.name

    def _ask(self, endpoints: Endpoints, asked: Sequence[Any], answers: Sequence[str]) -> list[float | None]:
        """A grade for each question, or None; the very first one is asked alone, to learn from it."""
        if not asked:
            return []
        first = [] if self._answered else [self._learn(endpoints, asked[0], answers[0])]
        self._answered = True

        def failed(place: int, error: EndpointError) -> float | None:
            raise self._failed(answers[place], error) from error

        rest = endpoints.map(
            range(len(first), len(asked)),
            lambda place: (PATH, self._dialect.body(self._model, asked[place])),
            lambda place, answer: read_grade(answer),
            failed,
        )
        return [*first, *(grade for some in rest for grade in some)]

    def _learn(self, endpoints: Endpoints, messages: Any, answer: str) -> float | None:
        """Ask, and go without what the endpoint does not take."""
        while True:
            try:
                return endpoints.post(PATH, self._dialect.body(self._model, messages), read_grade)
            except EndpointError as error:
                if error.status is None or not (without := self._dialect.learn(error)):
                    raise self._failed(answer, error) from error
                logger.warning("%s does not take %s: going on without (%s)", self._said, without, error)

    def _failed(self, answer: str, error: EndpointError) -> ModelError:
        return ModelError(f"{self._said}, for the answer {answer[:80]!r}: {error}")


def _make(argument: str, options: Mapping[str, Any]) -> JudgeReward:
    """Of `URL#MODEL,KEY=VALUE,…`."""
    where, *parts = argument.split(",")
    given, (url, _, model) = read_keyed("judge", parts, KEYS), where.partition("#")
    numbers = {name: number("judge", name, given[name]) for name in KEYS[1:] if name in given}
    for name in ("max_tokens", "concurrency", "max_retries"):
        if not numbers.get(name, 0.0).is_integer():
            raise InvalidOption(f"judge: {name} must be a whole number, not '{given[name]}'")
    counts = {name: int(numbers[name]) for name in ("concurrency", "max_retries") if name in numbers}
    seconds = {name: numbers[name] for name in ("request_timeout",) if name in numbers}
    limits: dict[str, Any] = {"concurrency": CONCURRENCY} | counts | seconds
    room = int(numbers.get("max_tokens", MAX_TOKENS))
    criterion = given.get("criterion", "helpful")
    return JudgeReward(url, model or None, criterion=criterion, max_tokens=room, limits=Limits(**limits))


JUDGE = RewardKind(
    "judge",
    f"URL#MODEL, a model behind an OpenAI-compatible endpoint that grades each answer; behind it may stand"
    f" ,criterion=… ({', '.join(RUBRICS)}), ,max_tokens=, ,concurrency=, ,request_timeout= and ,max_retries=",
    _make,
)
