"""β of each round: as it was asked for, with a warm start; or what a budget of divergence allows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trimtab.core.rewards import pick_beta
from trimtab.train.online.samples import Sample

__all__ = ["Betas"]

WINDOW = 8
"""Rounds that a budget's β is estimated from."""

NO_MATTER = 1.0
"""β where no reward differs within a group, so that it changes nothing."""

ANNEALED = 0.5
"""The share of a run in which β falls to what was asked for."""


@dataclass(frozen=True)
class Betas:
    """How β goes.

    Attributes:
        beta: as it was asked for; None where there is a budget.
        start: times that is where it starts.
        rounds: of the run.
        budget: nats of KL(target‖proposal), summed over an answer.
    """

    beta: float | None
    start: float
    rounds: int
    budget: float | None

    def last(self, step: int, read: Callable[[int], Sequence[Sample]]) -> float:
        """What a look after so many updates goes by: what was asked for, or under a budget β of the round before it."""
        return self.beta if self.beta is not None else self.at(max(0, step - 1), read)

    def at(self, number: int, read: Callable[[int], Sequence[Sample]]) -> float:
        """β of a round.

        Under a budget it is the one at which the target's divergence is that; but no more at a time than samples of the
        policy as it is can tell of, half a nat for each e-fold of a prompt's answers beyond its own divergence.

        Args:
            number: of the round.
            read: gives the samples of a round up to this one.
        """
        if self.budget is None:
            assert self.beta is not None  # as `refuse_beside_rewards` has it
            return self.beta * (self.start + (1 - self.start) * min(1.0, number / max(1.0, ANNEALED * self.rounds)))
        gains, rewards, groups, count, used = [], [], [], 0, 0
        for one in range(number, -1, -1):
            places: dict[int, int] = {}
            for sample in read(one):
                if sample.score is not None and sample.gain is not None and sample.temperature == 1:
                    gains.append(sample.gain)
                    rewards.append(sample.score)
                    groups.append(places.setdefault(sample.group, count + len(places)))
            count, used = count + len(places), used + bool(places)
            if used == WINDOW:
                break
        if not gains:
            return NO_MATTER
        here, owner = torch.tensor(gains, dtype=torch.float64), torch.tensor(groups)
        sizes = owner.bincount().double()
        allowed = max(0.0, float(here.mean())) + 0.5 * float(sizes.log().mean())
        beta = pick_beta(here, torch.tensor(rewards, dtype=torch.float64), owner, min(self.budget, max(allowed, 1e-3)))
        return beta if math.isfinite(beta) else NO_MATTER
