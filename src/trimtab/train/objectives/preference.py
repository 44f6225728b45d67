"""`preference`: DPO of the product model against the proposal, which cancels; of a head, of what is decoded against it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trimtab.core.objectives import preference
from trimtab.options import option, same
from trimtab.train.objectives.base import OBJECTIVES, EqualPairs
from trimtab.train.objectives.contrasting import Contrasting
from trimtab.train.objectives.losses import Alone
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss

__all__ = ["Preference"]


@OBJECTIVES.register
@dataclass(frozen=True)
class Preference(Contrasting):
    """−log σ(β(log Q(y_w|x) − log Q(y_l|x))); of a head log Q − log P_M in the place of log Q.

    With `contrast_on` edits, each sum over an answer's tokens is one over its edits.
    """

    name: ClassVar[str] = "preference"
    equal_pairs: ClassVar[EqualPairs] = EqualPairs("left out", dropped=True, instead="take --objective sft")

    contrast_on: str = same(Contrasting, "contrast_on", help="as in likelihood")
    edit_margin: int = same(Contrasting, "edit_margin", help="as in likelihood")
    beta: float = option(0.1, "inverse temperature of the reward, which is summed over an answer", above=0)

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """For a head what decodes its own row."""
        return ("geometric",) if setting.head else ("product", "candidates")

    @property
    def answers(self) -> tuple[str, ...]:
        """Both."""
        return ("chosen", "rejected")

    def compares(self, setting: Setting) -> bool:
        """A head with the proposal; of a residual's reward the proposal cancels."""
        return setting.head

    def has_reference(self, setting: Setting) -> bool:
        """For a head."""
        return setting.head

    def arguments(self, setting: Setting) -> Mapping[str, Any]:
        """At the 1e-3 and 3e-4 of other heads, a head's loss on the development pairs of HH rises early."""
        return {"learning_rate": 1e-4} if setting.head else {}

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """By the aligner alone."""
        return (Alone(),)

    def loss(self, batch: Batch) -> Tensor:
        """From rewards that are summed over tokens."""
        losses = {which: batch.tokens(Alone(), which) for which in self.answers}
        if self.compares(batch.setting):
            rewards = {which: batch.gain(loss, which, edits=self.on_edits) for which, loss in losses.items()}
        else:
            rewards = {which: -batch.sum(loss, which, edits=self.on_edits) for which, loss in losses.items()}
        return preference(rewards["chosen"], rewards["rejected"], self.beta)
