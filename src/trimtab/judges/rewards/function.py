"""TRL's reward functions, as they are: `f(prompts, completions, **columns) -> list[float]`.

They are called as `trl.GRPOTrainer` calls them. `prompts` and `completions` are lists of one length: texts, and for prompts
that are chats lists of messages, a completion being the assistant's one. The data's other columns come by name, each as a list
of that length. A function gives a number for each, or None for no score; it may be async. Not given is what only a trainer has:
`completion_ids`, `trainer_state`, `log_extra`, `log_metric` and `environments`; a function that cannot be without is refused.
What a function does not take by name, and has no `**kwargs` for, is not given to it either, where TRL would fail.

A function is called with all completions at once. Where that fails, it is called with each by itself, to say which one it was.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from trimtab.errors import InvalidOption, ModelError
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Failures, Reward, RewardFunction, RewardKind
from trimtab.judges.rewards.calling import (
    Arguments,
    Failed,
    Replies,
    ask,
    ask_alone,
    make_arguments,
    only,
    read_value,
    show,
)
from trimtab.judges.rewards.importing import digest, find_function

__all__ = ["FUNCTION", "ON_ERROR", "FunctionReward"]

GIVEN = ("prompts", "completions")
OF_TRAINERS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")

ON_ERROR = ("stop", "none")
"""What becomes of a completion that a function fails for: it ends the run, or has no score."""


class FunctionReward(Reward):
    """What a function says.

    Args:
        function: takes `prompts`, `completions` and columns by name, see above.
        name: what reports call it. Default: the function's name.
        fingerprint: what tells it from other functions. Default: a digest of its source file and its name; what the file
            imports, and what the function holds, are not seen.
        on_error: what comes of a completion that it fails for, by raising or by giving what is no score: `"stop"` raises a
            `ModelError`, `"none"` counts it in `failures` and gives it no score.

    Raises:
        InvalidOption: it cannot be called without what only a trainer has, its source cannot be read, or `on_error` is
            neither.
    """

    def __init__(
        self, function: RewardFunction, name: str | None = None, fingerprint: str | None = None, *, on_error: str = "stop"
    ) -> None:
        if on_error not in ON_ERROR:
            raise InvalidOption(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
        self._function, self._on_error = function, on_error
        own = str(getattr(function, "__name__", type(function).__name__))
        self.name = name or own
        self.fingerprint = fingerprint or digest(_source(function), own)
        self._needs, self._takes = _parameters(function)
        if trainers := [name for name in self._needs if name in OF_TRAINERS]:
            raise InvalidOption(f"the reward function {own} needs '{trainers[0]}', which only a trainer has")
        self._names: dict[str, None] = {}
        self._seen: list[Asked] = []
        self.reads_columns = self._takes is None or bool(self._takes - {*GIVEN, *OF_TRAINERS})

    def check(self, asked: Asked) -> None:
        """Refuse data without a column that the function cannot be without."""
        names = dict.fromkeys(name for row in asked.columns for name in row)
        if missing := [name for name in self._needs if name not in (*GIVEN, *names)]:
            raise InvalidOption(
                f"{self._called} takes '{missing[0]}', and the data have no such column; beside prompt and completion they"
                f" have: {', '.join(names) or 'none'}"
            )
        self._names |= names
        self._seen.append(asked)

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """What the function gives, checked.

        Raises:
            ModelError: it fails, or does not give a finite number or None for each; names the prompt and the completion.
        """
        scores: list[float | None] = [None] * len(prompts)
        if not prompts:
            return scores
        arguments = self._arguments(prompts, answers, columns)
        with closing(self._replies(arguments, len(prompts))) as replies:
            for i, reply in replies:
                if isinstance(reply, Failed):
                    self._fail(reply, f"{self._called}, for {self._show(prompts[i], answers[i])}: {reply}")
                else:
                    scores[i] = reply
        return scores

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        return {"function": self.name, "fingerprint": self.fingerprint}

    def _replies(self, arguments: Arguments, count: int) -> Replies:
        """The score of each completion by its place, in any order."""
        try:
            values = ask(self._function, arguments, count)
        except Failed as failed:
            yield from self._each_alone(arguments, count, failed)
        else:
            for i, value in enumerate(values):
                yield i, read_value(value)

    def _each_alone(self, arguments: Arguments, count: int, together: Failed) -> Replies:
        """The same after a call of all of them has failed: which one it fails for."""
        if count == 1:
            yield 0, together
            return
        found = False
        for i in range(count):
            reply = ask_alone(self._function, only(arguments, i))
            found = found or isinstance(reply, Failed)
            yield i, reply
        if not found:
            message = f"{self._called}, for {count} completions together: {together}; for each of them alone it did not fail"
            self._fail(together, message)

    def _arguments(self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> Arguments:
        names = self._names | dict.fromkeys(name for row in columns for name in row) if self.reads_columns else {}
        return make_arguments(prompts, answers, {name: [row.get(name) for row in columns] for name in names}, self._takes)

    def _fail(self, failed: Failed, message: str) -> None:
        """Do with what went wrong as the user said."""
        if self._on_error == "stop":
            raise ModelError(message) from failed.__cause__
        self.failures = self.failures.plus(Failures(1, message))

    def _show(self, prompt: Any, answer: str) -> str:
        places = ((seen.sources[i], p) for seen in self._seen for i, p in enumerate(seen.prompts))
        return show(prompt, answer, next((source for source, known in places if known == prompt), None))

    @property
    def _called(self) -> str:
        return self.called or f"the reward function {self.name}"


def _parameters(function: RewardFunction) -> tuple[list[str], frozenset[str] | None]:
    """The names that a function cannot be called without, and those that it takes; None if it takes all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in one says nothing
        return [], None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needs = [parameter.name for parameter in named if parameter.default is parameter.empty]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return needs, None if takes_all else frozenset(parameter.name for parameter in named)


def _source(function: RewardFunction) -> bytes:
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
        if file is not None and Path(file).is_file():
            return Path(file).read_bytes()
        return inspect.getsource(function).encode()  # a notebook's cell
    except (TypeError, OSError):
        raise InvalidOption(
            f"the source of the reward function {function!r} cannot be read, and so a run that goes on could not tell it from"
            " another: give trimtab.judges.rewards.function.FunctionReward(function, fingerprint='a name and version of yours')"
        ) from None


def _make(argument: str, options: Mapping[str, Any]) -> FunctionReward:
    return FunctionReward(*find_function(argument))


FUNCTION = RewardKind(
    "function",
    "MODULE.py:FUNCTION or package.module:FUNCTION, also without the kind: TRL's f(prompts, completions, **columns)",
    _make,
)
