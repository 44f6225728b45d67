"""What can be said of rewards that something is trained or drawn by, as options of commands."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import InvalidOption
from trimtab.judges.rewards.base import Reward, RewardFunction
from trimtab.judges.rewards.function import ON_ERROR
from trimtab.judges.rewards.kinds import reward_help
from trimtab.judges.rewards.making import make_rewards
from trimtab.knobs import MAX_FACTOR
from trimtab.options import option

__all__ = ["RewardOptions"]


def _help() -> str:
    return (
        f"what scores completions; may repeat. A function is imported and runs as your code, with your rights. {reward_help()}"
    )


@dataclass(frozen=True)
class RewardOptions:
    """Which rewards, and how they are called."""

    reward: tuple[str | Reward | RewardFunction, ...] = option((), _help, metavar="R")
    reward_weights: tuple[float, ...] = option(
        (),
        "the weight of each --reward in their sum, in their order; may repeat [default: 1 for each]",
        low=-MAX_FACTOR,
        high=MAX_FACTOR,
    )
    reward_timeout: float | None = option(
        None,
        "seconds of a function for one completion; it is then called in worker processes, with one completion at a time, and"
        " a process that takes longer is ended [default: no limit]",
        above=0,
        below=math.inf,
    )
    reward_workers: int | None = option(
        None,
        "worker processes for each function, which may then crash without ending the run [default: 1 with --reward_timeout;"
        " otherwise functions are called in this process, with all completions at once]",
        low=1,
    )
    reward_errors: str = option(
        "stop",
        "what comes of a completion that a function raises for, gives no number, takes too long, or crashes its process: stop"
        " ends the run and says which one it was; none gives it no score, and counts it",
        choices=ON_ERROR,
    )

    def idle(self) -> dict[str, str]:
        """What is of no reward."""
        if not self.reward and self.reward_errors == "none":  # which is otherwise a word for an option that is off
            raise InvalidOption("--reward_errors needs --reward")
        return {} if self.reward else dict.fromkeys(("reward_weights", "reward_timeout", "reward_workers"), "needs --reward")

    def sum_of_rewards(self, options: Mapping[str, Any]) -> Reward:
        """The weighted sum of the rewards, checked but not loaded.

        Args:
            options: `dtype` and `device`, by name.

        Raises:
            InvalidOption, DataError: as `make_rewards`.
        """
        return make_rewards(
            self.reward,
            self.reward_weights or None,
            timeout=self.reward_timeout,
            workers=self.reward_workers,
            on_error=self.reward_errors,
            options=options,
        )
