"""What a run minimises: one file for each objective, and what each of them is made of."""

from trimtab.train.objectives.base import OBJECTIVES, EqualPairs, Objective
from trimtab.train.objectives.gains import Ending, Gained, Proposed, Valued
from trimtab.train.objectives.grpo import GroupRelativePolicy
from trimtab.train.objectives.likelihood import Likelihood
from trimtab.train.objectives.losses import Alone, Decoded, LanguageModel
from trimtab.train.objectives.preference import Preference
from trimtab.train.objectives.ram import RAM
from trimtab.train.objectives.seen import Batch, Logits, Rows, Setting, TokenLoss
from trimtab.train.objectives.sft import SFT
from trimtab.train.objectives.soft_q import SoftQ
from trimtab.train.objectives.subtb import SubtrajectoryBalance
from trimtab.train.objectives.tb import TrajectoryBalance

__all__ = [
    "OBJECTIVES",
    "RAM",
    "SFT",
    "Alone",
    "Batch",
    "Decoded",
    "Ending",
    "EqualPairs",
    "Gained",
    "GroupRelativePolicy",
    "LanguageModel",
    "Likelihood",
    "Logits",
    "Objective",
    "Preference",
    "Proposed",
    "Rows",
    "Setting",
    "SoftQ",
    "SubtrajectoryBalance",
    "TokenLoss",
    "TrajectoryBalance",
    "Valued",
]
