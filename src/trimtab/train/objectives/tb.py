"""`tb`: trajectory balance, which makes what is decoded the sequence-level target P_M·e^{r/β}, from samples of any policy."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.rewards import trajectory_balance
from trimtab.errors import InvalidOption
from trimtab.options import option
from trimtab.train.objectives.base import OBJECTIVES
from trimtab.train.objectives.gains import Proposed
from trimtab.train.objectives.rewarded import Rewarded
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss

__all__ = ["OffPolicy", "TrajectoryBalance"]


@dataclass(frozen=True)
class OffPolicy(Rewarded):
    """What learns P_M·e^{r/β} from samples of any policy: how they are drawn, and β."""

    budgeted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Also that temperatures are in order."""
        super().__post_init__()
        if self.lowest_temperature > self.highest_temperature:
            raise InvalidOption(f"lowest_temperature is above highest_temperature, {self.highest_temperature:g}: exchange them")

    beta: float | None = option(
        None,
        "what a nat of KL(aligned‖proposal), summed over an answer, costs in units of reward (required without --max_kl, which"
        " settles it)",
        above=0,
    )
    tempered_share: float = option(
        0.67, "share of the prompts whose samples are drawn at another temperature than 1", low=0, high=1
    )
    lowest_temperature: float = option(0.5, "of those, drawn evenly between this and the next", low=0.01, high=100)
    highest_temperature: float = option(2.0, "the other end", low=0.01, high=100)
    replay_share: float = option(
        0.25, "share of a prompt's samples that are earlier ones, as far as there are any, better ones first", low=0, high=1
    )
    beta_start: float = option(
        1.25, "times --beta is where the reward's temperature starts; it falls to --beta in the first half of the run", low=1
    )


@OBJECTIVES.register
@dataclass(frozen=True)
class TrajectoryBalance(OffPolicy):
    """The variance of log P_θ(y|x) − log P_M(y|x) − r(x, y)/β over a prompt's samples, in nats²."""

    name: ClassVar[str] = "tb"

    prior: float = option(
        1.0,
        "exponent of the proposal in the target P_M^prior·e^{r/β}: 0 leaves it out, so that answers of one reward are equally"
        " likely",
        low=0,
        high=1,
    )

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """Also the proposal's own log-probabilities, where the target has another exponent of it."""
        return super().token_losses(setting) + ((Proposed(),) if self.prior != 1 else ())

    def loss(self, batch: Batch) -> Tensor:
        """Of a sample, its part of its group's variance."""
        c = self.gain(batch)
        if self.prior != 1:  # log P_θ − prior·log P_M
            c = c + (1 - self.prior) * batch.sum(batch.tokens(Proposed()))
        return trajectory_balance(c, batch.rewards, batch.beta, batch.groups)
