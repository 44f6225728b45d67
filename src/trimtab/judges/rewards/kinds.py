"""The kinds of rewards, ours and other packages', and what a user's text means.

A package adds one with an entry point in the group `trimtab.rewards`: a `RewardKind`. docs/extending.md has an example.
"""

from collections.abc import Mapping
from typing import Any

from trimtab.endpoints.settings import without_password
from trimtab.errors import InvalidOption
from trimtab.judges.rewards.base import Reward, RewardKind
from trimtab.judges.rewards.contrast import CONTRAST
from trimtab.judges.rewards.file import FILE
from trimtab.judges.rewards.function import FUNCTION
from trimtab.judges.rewards.judge import JUDGE
from trimtab.judges.rewards.model import MODEL
from trimtab.options import meant
from trimtab.registry import Registry, check_is, help_of

__all__ = ["REWARDS", "make_reward", "parse_reward", "reward_help"]

REWARDS: Registry[RewardKind] = Registry("reward", "trimtab.rewards", check_is(RewardKind))
for _kind in (MODEL, FUNCTION, FILE, CONTRAST, JUDGE):
    REWARDS.add(_kind.name, _kind)


def parse_reward(text: str) -> tuple[RewardKind, str]:
    """The kind and the argument that a text names: `KIND:ARGUMENT`; `MODULE:FUNCTION` and `MODULE.py:FUNCTION` are functions.

    Raises:
        InvalidOption: it names none, or a package's kind that cannot be used.
    """
    name, colon, argument = text.partition(":")
    if colon and argument and name in REWARDS:
        return REWARDS[name], argument
    if not argument and name in REWARDS:
        raise InvalidOption(f"'{name}' needs an argument: {name}:{REWARDS[name].help}")
    module, colon, function = text.rpartition(":")
    if colon and function.isidentifier() and (module.endswith(".py") or "." in module):
        return FUNCTION, text
    raise InvalidOption(
        f"'{text}' is no reward: give MODULE.py:FUNCTION, or KIND:ARGUMENT with a kind of"
        f" {', '.join(sorted(REWARDS))}{meant(name, REWARDS)}"
    )


def make_reward(text: str, options: Mapping[str, Any]) -> Reward:
    """The reward that a text names.

    Args:
        text: what `parse_reward` takes.
        options: `dtype` and `device`, by name; it is given those that its kind says it reads.

    Raises:
        InvalidOption, DataError: the text names none, or what it names cannot be used.
    """
    kind, argument = parse_reward(text)
    reward = kind.make(argument, {name: options[name] for name in kind.reads(argument) if name in options})
    reward.called = reward.called or without_password(text)
    return reward


def reward_help() -> str:
    """What `--reward` takes, with the kinds that are installed."""
    return f"KIND:ARGUMENT. {help_of(REWARDS)}"
