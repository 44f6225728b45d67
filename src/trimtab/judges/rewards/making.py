"""What the options of a command say of rewards: which, with which weights, and where functions are called."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from trimtab.endpoints.settings import without_password
from trimtab.errors import InvalidOption
from trimtab.judges.rewards.base import Reward, RewardFunction
from trimtab.judges.rewards.combined import combine
from trimtab.judges.rewards.function import FUNCTION, FunctionReward
from trimtab.judges.rewards.importing import find_function
from trimtab.judges.rewards.kinds import make_reward, parse_reward
from trimtab.judges.rewards.workers import WorkerReward

__all__ = ["make_rewards"]


def make_rewards(
    rewards: Sequence[str | Reward | RewardFunction],
    weights: Sequence[float] | None = None,
    *,
    timeout: float | None = None,
    workers: int | None = None,
    on_error: str = "stop",
    options: Mapping[str, Any],
) -> Reward:
    """One reward of those that a command is told, checked but not loaded.

    Args:
        rewards: texts of any kind, functions, and rewards.
        weights: one for each. Default: 1 for each.
        timeout: seconds of a function for one completion; with it, functions are called in worker processes.
        workers: how many processes for each function. Default: 1 with a `timeout`, otherwise functions are called here.
        on_error: what comes of a completion that a function fails for, see `FunctionReward`.
        options: `dtype` and `device`, by name, for the kinds that read them.

    Raises:
        InvalidOption, DataError: one of them cannot be used, or an option would have no effect; names the option.
    """
    if not rewards:
        raise InvalidOption("--reward is required")
    apart = {"reward_timeout": timeout, "reward_workers": workers}
    asked = [name for name, value in apart.items() if value is not None]
    with _named():
        functions = [given for given in rewards if _is_function(given)]
    if (told := asked + ["reward_errors"] * (on_error != "stop")) and not functions:
        raise InvalidOption(f"--{told[0]} is for functions, and no --reward is one: leave it out")
    if asked and (here := [given for given in rewards if _is_here(given)]):
        name = getattr(here[0], "__name__", None) or getattr(here[0], "name", repr(here[0]))
        raise InvalidOption(
            f"--{asked[0]}: the function '{name}' is an object of this process, which a worker process cannot import: give"
            " MODULE.py:FUNCTION or package.module:FUNCTION"
        )
    count = None if not asked else 1 if workers is None else workers
    with _named():
        made = [_made(given, count, timeout, on_error, options) for given in rewards]
    try:
        return combine(made, weights)
    except InvalidOption as error:
        raise InvalidOption(f"--reward_weights: {error}") from error


def _made(given: Any, workers: int | None, timeout: float | None, on_error: str, options: Mapping[str, Any]) -> Reward:
    """One of them; functions that are texts in so many worker processes, or here."""
    if isinstance(given, Reward):
        return given
    reward: Reward
    if not isinstance(given, str):
        reward = FunctionReward(given, on_error=on_error)
    elif not _is_function(given):
        reward = make_reward(given, options)
    elif workers is None:
        reward = FunctionReward(*find_function(parse_reward(given)[1]), on_error=on_error)
    else:
        reward = WorkerReward(parse_reward(given)[1], workers=workers, timeout=timeout, on_error=on_error)
    reward.called = f"--reward {without_password(given) if isinstance(given, str) else reward.name}"
    return reward


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except InvalidOption as error:
        raise InvalidOption(f"--reward: {error}") from error


def _is_function(given: Any) -> bool:
    """Whether it is a function, as a text or itself."""
    if isinstance(given, str):
        return parse_reward(given)[0] is FUNCTION
    if isinstance(given, Reward):
        return False
    if not callable(given) or isinstance(given, type):
        raise InvalidOption(f"must be a text, a function, or a trimtab.judges.rewards.base.Reward, not {given!r}")
    return True


def _is_here(given: Any) -> bool:
    """Whether it is a function that only this process can call."""
    if isinstance(given, Reward):
        return isinstance(given, FunctionReward) and not isinstance(given, WorkerReward)
    return not isinstance(given, str)
