"""`likelihood`: the exact negative log-likelihood of what is decoded, with a contrast between answers where there are pairs."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trimtab.core.objectives import preference
from trimtab.core.rules import Geometric, Mixture, Product
from trimtab.errors import InvalidOption
from trimtab.options import option
from trimtab.train.objectives.base import OBJECTIVES, EqualPairs, Objective
from trimtab.train.objectives.contrasting import Contrasting
from trimtab.train.objectives.losses import Decoded, LanguageModel, is_plain, refuse_beside_head
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss
from trimtab.train.objectives.taught import Taught

__all__ = ["Likelihood"]

logger = logging.getLogger(__name__)

TRAINED = (Product, Geometric, Mixture)
"""Rules whose likelihood is trained."""

SFT_WEIGHT = 0.3
"""Of the regulariser of a tempered start."""

CONTRAST = 1.0
"""Of the contrast, where a residual's or a head's records have rejected answers."""

BETA = 1.0
"""Of the contrast, whose rewards are nats a token."""


@OBJECTIVES.register
@dataclass(frozen=True)
class Likelihood(Contrasting):
    """−log P(y|x) of the aligned model; + γ·DPO of what is decoded against the proposal, in nats a token; + a regulariser.

    With `contrast_on` edits, the contrast's rewards are means over the edits of each answer, and 0 of one that has none.
    """

    name: ClassVar[str] = "likelihood"
    likely: ClassVar[bool] = True
    residual: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    equal_pairs: ClassVar[EqualPairs] = EqualPairs("left out of the contrast", instead="leave them out with --contrast 0")

    contrast: float | None = option(
        None,
        "weight of length-normalised DPO between chosen and rejected answers, for the aligned model against the proposal"
        " [default: 1 for product where every record has a rejected answer, otherwise 0]",
        low=0,
    )
    beta: float | None = option(
        None, "inverse temperature of the contrast's reward, which is averaged over an answer [default: 1]", above=0
    )
    sft_weight: float | None = option(
        None,
        "weight of −log Q(y|x) in the training loss, which keeps the aligner a language model and so from overfitting"
        " [default: 0.3 with a tempered start, otherwise 0]",
        low=0,
    )

    def settle(self, setting: Setting) -> Self:
        """A contrast where every record has a rejected answer, a regulariser with a tempered start."""
        if not isinstance(setting.rule, TRAINED):
            raise InvalidOption(f"likelihood trains product, geometric or mixture, for '{setting.rule}' use sft")
        refuse_beside_head(setting, self.sft_weight)
        filled: dict[str, Any] = {"contrast": self._contrast(setting)}
        if filled["contrast"] == 0:
            by_data = self._by_data(setting)
            self._refuse_idle("records without a rejected answer have no contrast" if by_data else "there is no contrast")
        if self.beta is None:
            filled["beta"] = BETA
        if self.sft_weight is None:
            filled["sft_weight"] = SFT_WEIGHT if setting.tempered else 0.0
        return dataclasses.replace(self, **filled)

    def announce(self, setting: Setting) -> None:
        """Whether there is a contrast, where the data decide."""
        if not self._by_data(setting):
            return
        if not setting.lacking:
            dpo = "; where they say what is preferred and not what to say, take --objective preference" * setting.head
            logger.info("every record has a rejected answer: --contrast %g; 0 leaves it out%s", CONTRAST, dpo)
        elif setting.lacking < (setting.records or 0):
            logger.warning(
                "%d of %d records have no rejected answer: none of the others is learnt from", setting.lacking, setting.records
            )

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """Those that it can be had of."""
        return tuple(rule.name for rule in TRAINED)

    @property
    def answers(self) -> tuple[str, ...]:
        """Both for the contrast."""
        return ("chosen", "rejected") if self.contrast else ("chosen",)

    def reads(self, setting: Setting) -> bool:
        """Unless the target is the aligner's own row."""
        return not is_plain(setting)

    @property
    def edits(self) -> int | None:
        """For the contrast."""
        return super().edits if self.contrast else None

    def compares(self, setting: Setting) -> bool:
        """For the contrast."""
        return bool(self.contrast)

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """As decoded."""
        return (Decoded(),)

    def loss(self, batch: Batch) -> Tensor:
        """A pair of two equal answers has no contrast."""
        decoded = {which: batch.tokens(Decoded(), which) for which in self.answers}
        loss = batch.sum(decoded["chosen"]) / batch.mean_length
        if self.contrast:
            gains = {}  # log P_θ − log p̃ in nats a token: sums would be won by length
            for which, losses in decoded.items():
                count = batch.sum(torch.ones_like(losses), which, edits=self.on_edits)
                gains[which] = batch.gain(losses, which, edits=self.on_edits) / count.clamp(min=1)
            contrast = preference(gains["chosen"], gains["rejected"], BETA if self.beta is None else self.beta)
            loss = loss + self.contrast * torch.where(batch.differs, contrast, 0.0)
        if self.sft_weight and batch.training:
            loss = loss + self.sft_weight * batch.sum(batch.tokens(LanguageModel())) / batch.mean_length
        return loss

    def taught(self) -> Objective:
        """KL(teacher‖aligned).

        Raises:
            InvalidOption: a contrast is asked for, or an option of it.
        """
        if self.contrast:
            raise InvalidOption(
                "contrast: a teacher's rows say how likely every token is, unwanted ones too: leave it out beside"
                " teacher_prompt"
            )
        self._refuse_idle("there is no contrast")
        return Taught(sft_weight=self.sft_weight)

    def _refuse_idle(self, why: str) -> None:
        """Refuse options of a contrast that there is not."""
        for name, asked in (("beta", self.beta is not None), ("contrast_on", self.on_edits)):
            if asked:
                raise InvalidOption(f"{name}: {why}: leave it out")

    def _by_data(self, setting: Setting) -> bool:
        """Whether the data decide that there is a contrast."""
        return self.contrast is None and setting.records is not None and self._may_contrast(setting)

    def _may_contrast(self, setting: Setting) -> bool:
        return setting.head or isinstance(setting.rule, Product)

    def _contrast(self, setting: Setting) -> float | None:
        """Its weight; None where the data are to decide."""
        if self.contrast is not None or not self._may_contrast(setting):
            return self.contrast or 0.0
        if setting.records is None:
            return None
        return 0.0 if setting.lacking else CONTRAST
