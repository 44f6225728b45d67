"""A judge behind an OpenAI-compatible endpoint: shown both answers, in both orders, many questions at a time.

Each answer goes into the journal as it comes. A question that got none (nonsense, a refusal, no answer in time) counts as
missing in the end, and the others go on; only an endpoint that does not answer at all, or refuses whatever it is asked, ends
the run, which goes on from the journal when it is started again.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.reach import reach
from trimtab.endpoints.settings import Limits, base_url, is_url, without_password
from trimtab.errors import BudgetExceeded, EndpointError, InvalidOption
from trimtab.journal import Journal, key_of
from trimtab.judges.base import Judge, JudgeKind, Judgement, Pair
from trimtab.judges.budget import Budget, Size
from trimtab.judges.criteria import CRITERIA, judge_messages, read_verdict
from trimtab.judges.dialect import Dialect

__all__ = ["ENDPOINT", "MAX_TOKENS", "ORDERS", "EndpointJudge"]

logger = logging.getLogger(__name__)

ORDERS = ("both", "random")
PATH = "/v1/chat/completions"

MAX_TOKENS = 4
"""Of an answer: room for a quote or a line break before the name."""

TRIES = 3
"""How often a question is asked whose answer names neither output."""

FATAL = (401, 402)
"""Refusals that are never about the one request; 403 and 404 may be, from an endpoint that has answered before."""

IN_A_ROW = 20
"""So many refusals, or answers without a verdict, and nothing else, are about the endpoint; three times as many answers from
one that has given verdicts before."""

EXHAUSTED = 3
"""So many questions that failed every time, before any was answered, are about the endpoint."""

MOST_TOKENS = 2**53
"""An endpoint that claims more for one answer does not count."""

SAY_EVERY = 5.0
"""Seconds between two lines of progress."""


class _Question(NamedTuple):
    """One order of a pair."""

    key: str
    messages: list[dict[str, str]]
    size: Size
    swapped: bool
    """Whether the second answer is shown first."""


class EndpointJudge(Judge):
    """Asks a model which of two answers is better.

    Args:
        url: where it is, with `/v1` or without.
        model: its name there; None takes the first that is listed.
        criterion: one of `CRITERIA`.
        orders: `"both"` shows each pair twice, with either answer first; `"random"` once, in an order drawn from its text.
        max_tokens: room for an answer; a model that thinks before it names one needs more.
        limits: how much to ask at once, how long to wait, how often to try again.
        budget: what it may cost.

    Raises:
        InvalidOption: the URL is none, criterion or orders do not exist, or `max_tokens` is below 1.
    """

    kind = "endpoint"

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        criterion: str = "helpful",
        orders: str = "both",
        max_tokens: int = MAX_TOKENS,
        limits: Limits | None = None,
        budget: Budget | None = None,
    ) -> None:
        if criterion not in CRITERIA:
            raise InvalidOption(f"criterion must be one of {', '.join(CRITERIA)}, not '{criterion}'")
        if orders not in ORDERS:
            raise InvalidOption(f"orders must be one of {', '.join(ORDERS)}, not '{orders}'")
        if max_tokens < 1:
            raise InvalidOption(f"judge_max_tokens must be at least 1, not {max_tokens}")
        base_url(url)
        self.url, self.model, self.criterion, self.orders = url, model, criterion, orders
        self.limits = limits or Limits(concurrency=8)
        self.budget = budget or Budget(None, None, None)
        self._dialect = Dialect(max_tokens)
        self._refused: dict[str, str] = {}
        """Why a question got no answer in this run, by its key."""
        self._answered = self._booked = False
        """Whether the endpoint has answered in this run; whether what earlier runs asked is in the budget."""
        self._accepted = self._decided = False
        """Whether it has ever answered, and with a verdict."""
        self._refusals = self._undecided = self._exhausted = 0
        """In a row."""
        self._said = ""
        """The beginning of its last answer."""
        self._elsewhere: list[str] = []
        """Where else a model of this name has answered."""
        self._public_url = without_password(base_url(url))
        self.name = model or self._public_url
        self.questions = 2 if orders == "both" else 1

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        known: dict[str, Any] = {
            "url": self._public_url,
            "model": self.model,
            "criterion": self.criterion,
            "orders": self.orders,
        }
        return known | self._dialect.fields | ({"also_answered_at": self._elsewhere} if self._elsewhere else {})

    def cost(self) -> dict[str, Any]:
        """Requests, tokens and, with prices, the amount."""
        return self.budget.report()

    def reach(self) -> None:
        """See whether the endpoint answers, and ask it for the model's name if none was given."""
        self.model = self.name = reach(self.url, self.model, self.limits)

    def judge(self, pairs: Sequence[Pair], journal: Journal) -> list[Judgement]:
        """An opinion of each pair; identical answers are a draw, without asking.

        Raises:
            EndpointError: the endpoint does not answer, or refuses what no other request would change.
            BudgetExceeded: the next question might cost more than is left.
        """
        if self.model is None:
            self.reach()
        self._book(journal)
        asked = [[] if pair.output_1 == pair.output_2 else self._questions(pair) for pair in pairs]
        distinct = {question.key: question for questions in asked for question in questions}
        self._ask(list(distinct.values()), journal)
        return [self._judgement(questions, journal) for questions in asked]

    def _questions(self, pair: Pair) -> list[_Question]:
        """With the baseline's answer first, and with the system's; only one of them if the order is drawn."""
        both = []
        for swapped in (False, True):
            shown = (pair.output_2, pair.output_1) if swapped else (pair.output_1, pair.output_2)
            messages = judge_messages(self.criterion, pair.instruction, *shown)
            size = Size(len(json.dumps(messages, ensure_ascii=False).encode()), self._dialect.max_tokens)
            both.append(_Question(key_of({"judge": self.model, "messages": messages}), messages, size, swapped))
        return both if self.orders == "both" else [min(both, key=lambda question: question.key)]

    def _judgement(self, questions: Sequence[_Question], journal: Journal) -> Judgement:
        if not questions:
            return Judgement(1.5)
        seen: list[float] = []
        for question in questions:
            answer = journal.get(question.key) or {}
            if answer.get("first") is None:
                why = self._refused.get(question.key) or f"no verdict in {answer.get('said')!r}"
                return Judgement(None, why_missing=why)
            seen.append(1 + answer["first"] if question.swapped else 2 - answer["first"])
        return Judgement(sum(seen) / len(seen), orders=(seen[0], seen[1]) if len(seen) == 2 else None)

    def _book(self, journal: Journal) -> None:
        """Count what earlier runs have asked this judge, whatever it was."""
        if self._booked:
            return
        self._booked = True
        mine = [(key, answer) for key, answer in journal.items() if answer.get("judge") == self.model and "url" in answer]
        if elsewhere := sorted({answer["url"] for _, answer in mine} - {self._public_url}):
            logger.warning("%s: answers of a model of this name at %s are kept", self.name, ", ".join(elsewhere))
            self._elsewhere = elsewhere
        for key, answer in mine:
            if "lost" in answer:
                self.budget.lose(Size(answer["bytes"], answer["room"]), answer["lost"])
                continue
            self._accepted = True
            self._decided |= answer["first"] is not None
            for usage in answer["usage"]:
                self.budget.settle(key, Size(answer["bytes"], answer["room"]), usage)

    def _ask(self, questions: Sequence[_Question], journal: Journal) -> None:
        """Put every question that has no verdict, some of them more than once; the first one alone, to learn from it."""
        progress = _Progress(self.name, len(questions))
        try:
            with Endpoints([self.url], self.limits) as endpoints:
                while open_ones := [question for question in questions if self._is_open(question, journal)]:
                    progress.done = len(questions) - len(open_ones)
                    progress.show()
                    self._ask_once(open_ones if self._answered else open_ones[:1], endpoints, journal, progress)
        finally:
            if sizes := self.budget.abandon():  # in flight when something else ended the run
                self._remember_lost(sizes, journal)
        progress.done = len(questions)
        progress.show(last=True)

    def _ask_once(self, questions: Sequence[_Question], endpoints: Endpoints, journal: Journal, progress: "_Progress") -> None:
        """Put each question once."""
        asked = progress.done
        for outcomes in endpoints.map(
            self._affordable(questions),
            lambda question: (PATH, self._dialect.body(self.model, question.messages)),
            lambda question, answer: self._take(question, answer, journal),
            self._failed,
            lambda question: self._lose(question, journal),
            in_order=False,
        ):
            progress.done += len(outcomes)
            progress.show()
            if self._undecided >= (3 * IN_A_ROW if self._decided else IN_A_ROW):
                raise EndpointError(
                    f"{self.name} names neither output, such as in {self._said!r}: let it write more with "
                    "--judge_max_tokens, or ask another model"
                )
        if progress.done == asked:
            raise BudgetExceeded(
                f"{self.name} has cost {self.budget.amount:.4g} of max_cost {self.budget.most:g}, with"
                f" {progress.total - asked} of {progress.total} questions left; what it said is kept: raise max_cost and run"
                " again"
            )

    def _is_open(self, question: _Question, journal: Journal) -> bool:
        """Whether a question has no verdict yet, and may get one; three tries with as much room as now are enough."""
        answer = journal.get(question.key)
        if question.key in self._refused or answer is None:
            return answer is None and question.key not in self._refused
        return answer["first"] is None and (answer["tries"] < TRIES or answer["room"] < self._dialect.max_tokens)

    def _affordable(self, questions: Sequence[_Question]) -> Iterator[_Question]:
        for question in questions:
            if not self.budget.reserve(question.key, question.size):
                return
            yield question

    def _take(self, question: _Question, answer: Any, journal: Journal) -> None:
        """Keep what the judge said."""
        verdict, usage = read_verdict(answer), _usage(answer)
        self._answered = self._accepted = True
        self._refusals = self._exhausted = 0
        self._decided |= verdict.first is not None
        self._undecided = 0 if verdict.first is not None else self._undecided + 1
        self._said = verdict.said
        self.budget.settle(question.key, question.size, usage)
        before = journal.get(question.key) or {"usage": [], "tries": 0, "room": 0}
        room = self._dialect.max_tokens
        known: dict[str, Any] = {"judge": self.model, "url": self._public_url, "bytes": question.size.prompt_bytes}
        known |= {"usage": [*before["usage"], usage], "room": room}
        known["tries"] = 1 + (before["tries"] if before["room"] >= room else 0)
        journal.add(question.key, verdict._asdict() | known)

    def _lose(self, question: _Question, journal: Journal) -> None:
        """Book a try that came to nothing, and remember it for the next run."""
        self.budget.lose(question.size)
        self._remember_lost([question.size], journal)

    def _remember_lost(self, sizes: Sequence[Size], journal: Journal) -> None:
        key = key_of({"judge": self.model, "what": "lost"})
        before = journal.get(key) or {"lost": 0, "bytes": 0, "room": 0}
        more = Size.sum(sizes)
        sums = {"bytes": before["bytes"] + more.prompt_bytes, "room": before["room"] + more.max_tokens}
        journal.add(key, {"judge": self.model, "url": self._public_url, "lost": before["lost"] + len(sizes), **sums})

    def _failed(self, question: _Question, error: EndpointError) -> None:
        """Learn from a refusal, or leave the question out; raise what is not about it."""
        self.budget.release(question.key)
        if error.all_down or error.status in FATAL:
            raise error
        if not self._answered and error.status is not None and (without := self._dialect.learn(error)):
            logger.warning("%s does not take %s: going on without (%s)", self.name, without, error)
            return
        refused = error.status is not None and error.status < 500
        if refused and error.status in (403, 404) and not self._accepted:
            raise error
        self._refusals += refused
        self._exhausted += not refused
        if self._refusals >= IN_A_ROW:
            raise EndpointError(f"{self.name} refuses every question, {IN_A_ROW} in a row; the last time: {error}")
        if self._exhausted >= EXHAUSTED and not self._answered:
            raise error
        logger.warning("%s: a question is left out: %s", self.name, error)
        self._refused[question.key] = str(error)


class _Progress:
    """A line now and then."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self.total, self.done, self._next = name, total, 0, 0.0

    def show(self, *, last: bool = False) -> None:
        if self.total and (last or time.monotonic() >= self._next):
            self._next = time.monotonic() + SAY_EVERY
            logger.info("%s: %d of %d questions", self._name, self.done, self.total)


def _usage(answer: Any) -> dict[str, int] | None:
    """What the endpoint counted, if it did."""
    usage = answer.get("usage") if isinstance(answer, Mapping) else None
    counts: dict[str, int] = {}
    for name in ("prompt_tokens", "completion_tokens"):
        value = usage.get(name) if isinstance(usage, Mapping) else None
        if type(value) is not int or not 0 <= value < MOST_TOKENS:
            return None
        counts[name] = value
    return counts


def _make(argument: str, options: Mapping[str, Any]) -> EndpointJudge:
    url, _, model = argument.partition("#")
    return EndpointJudge(
        url,
        model or None,
        criterion=options["criterion"],
        orders=options["orders"],
        max_tokens=options["judge_max_tokens"],
        limits=Limits(options["concurrency"], options["request_timeout"], options["max_retries"]),
        budget=Budget(options["prompt_price"], options["completion_price"], options["max_cost"]),
    )


READS = ("criterion", "orders", "judge_max_tokens", "prompt_price", "completion_price", "max_cost")
LIMITS = ("concurrency", "request_timeout", "max_retries")
ENDPOINT = JudgeKind(
    "endpoint",
    "URL#MODEL, a model behind an OpenAI-compatible endpoint, which is shown both answers; also without the kind",
    _make,
    lambda argument: (*READS, *LIMITS),
    lambda text: text if is_url(text) else None,
)
