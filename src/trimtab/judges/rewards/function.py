"""TRL's reward functions, as they are: `f(prompts, completions, **columns) -> list[float]`.

They are called as `trl.GRPOTrainer` calls them. `prompts` and `completions` are lists of one length: texts, and for prompts
that are chats lists of messages, a completion being the assistant's one. The data's other columns come by name, each as a list
of that length. A function gives a number for each, or None for no score; it may be async. Not given is what only a trainer has:
`completion_ids`, `trainer_state`, `log_extra`, `log_metric` and `environments`; a function that cannot be without is refused.
What a function does not take by name, and has no `**kwargs` for, is not given to it either, where TRL would fail.
"""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.data.prompts import is_chat
from trimtab.errors import InvalidOption, ModelError
from trimtab.files import expand_home
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Reward, RewardFunction, RewardKind, checked_scores

__all__ = ["FUNCTION", "FunctionReward"]

GIVEN = ("prompts", "completions")
OF_TRAINERS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


class FunctionReward(Reward):
    """What a function says.

    Args:
        function: takes `prompts`, `completions` and columns by name, see above.
        name: what reports call it. Default: the function's name.
        fingerprint: what tells it from other functions. Default: a digest of its source file and its name; what the file
            imports, and what the function holds, are not seen.

    Raises:
        InvalidOption: it cannot be called without what only a trainer has, or its source cannot be read.
    """

    def __init__(self, function: RewardFunction, name: str | None = None, fingerprint: str | None = None) -> None:
        self._function = function
        own = str(getattr(function, "__name__", type(function).__name__))
        self.name = name or own
        self.fingerprint = fingerprint or _digest(_source(function), own)
        self._needs, self._takes = _parameters(function)
        if trainers := [name for name in self._needs if name in OF_TRAINERS]:
            raise InvalidOption(f"the reward function {own} needs '{trainers[0]}', which only a trainer has")
        self._names: dict[str, None] = {}
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

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """What the function gives, checked.

        Raises:
            ModelError: it fails, or does not give a finite number or None for each.
        """
        if not prompts:
            return []
        asked: dict[str, Any] = {
            "prompts": [_messages(prompt) for prompt in prompts],
            "completions": [
                [{"role": "assistant", "content": answer}] if is_chat(prompt) else answer
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
        }
        if self.reads_columns:
            names = self._names | dict.fromkeys(name for row in columns for name in row)
            asked = {name: [row.get(name) for row in columns] for name in names} | asked
        if self._takes is not None:
            asked = {name: value for name, value in asked.items() if name in self._takes}
        try:
            given = self._function(**asked)
            if inspect.isawaitable(given):
                given = _awaited(given)
        except Exception as error:  # whatever somebody's function raises
            raise ModelError(f"{self._called} raised {type(error).__name__}: {error}") from error
        return checked_scores(self._called, given, len(prompts))

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        return {"function": self.name, "fingerprint": self.fingerprint}

    @property
    def _called(self) -> str:
        return self.called or f"the reward function {self.name}"


def _messages(prompt: Any) -> Any:
    """A prompt as TRL has it: tools and the like are columns."""
    return prompt["messages"] if isinstance(prompt, Mapping) and "messages" in prompt else prompt


def _awaited(given: Awaitable[Any]) -> Any:
    """What comes of it, on a thread of its own: a notebook's thread has a loop that runs already."""

    async def wait() -> Any:
        return await given

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()


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


def _digest(source: bytes, name: str) -> str:
    return "sha256:" + hashlib.sha256(source + b"\0" + name.encode()).hexdigest()


def _make(argument: str, options: Mapping[str, Any]) -> FunctionReward:
    """`MODULE.py:FUNCTION` or `package.module:FUNCTION`."""
    where, colon, name = argument.rpartition(":")
    if not colon or not where or not name:
        raise InvalidOption(f"'{argument}' is no function: give MODULE.py:FUNCTION or package.module:FUNCTION")
    module = _from_file(where) if where.endswith(".py") else _by_name(where)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InvalidOption(f"{where} has no function '{name}'; it has: {', '.join(there) or 'none'}")
    file = getattr(module, "__file__", None)
    fingerprint = _digest(Path(file).read_bytes(), name) if file is not None else None
    return FunctionReward(function, f"{module.__name__.rpartition('.')[2]}.{name}", fingerprint)


def _from_file(where: str) -> ModuleType:
    path = expand_home(where)
    if not path.is_file():
        raise InvalidOption(f"there is no file '{where}' with a reward function")
    name = f"trimtab_reward_{hashlib.sha256(bytes(path.absolute())).hexdigest()[:16]}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidOption(f"'{where}' is no module of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    with _importing(where, path.absolute().parent):
        spec.loader.exec_module(module)
    return module


def _by_name(where: str) -> ModuleType:
    with _importing(where, Path.cwd()):
        return importlib.import_module(where)


@contextmanager
def _importing(where: str, folder: Path) -> Iterator[None]:
    """Import with what lies beside at hand, as a script would; whatever is raised becomes an error of the option."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except Exception as error:  # whatever somebody's module raises
        raise InvalidOption(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        with suppress(ValueError):  # it may have changed the path itself
            sys.path.remove(str(folder))


FUNCTION = RewardKind(
    "function",
    "MODULE.py:FUNCTION or package.module:FUNCTION, also without the kind: TRL's f(prompts, completions, **columns)",
    _make,
)
