"""Learn a teacher's rows in place of wanted tokens: what the proposal says behind another prompt, `--teacher_prompt`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from trimtab.core.objectives import sampled_distillation
from trimtab.options import option
from trimtab.train.fused_likelihood import fused_distillation
from trimtab.train.objectives.base import Objective
from trimtab.train.objectives.losses import LanguageModel, refuse_beside_powers
from trimtab.train.objectives.seen import Batch, Logits, Rows, Setting, TokenLoss
from trimtab.train.rows import TaughtRows

__all__ = ["Taught"]


def _taught(rows: Rows) -> TaughtRows:
    assert rows.taught is not None  # as the setting says
    return rows.taught


@dataclass(frozen=True)
class TeacherToAligned(TokenLoss):
    """KL(teacher‖aligned) in nats, estimated where rows are compressed."""

    def of_rows(self, rows: Rows) -> Tensor:
        """The same arithmetic on rows, which are logits, too."""
        setting, everyone = rows.setting, torch.arange(len(rows.tokens), device=rows.logq.device)
        where = rows.logq, everyone, setting.weight, 1.0, rows.logq.shape[-1]
        return fused_distillation(setting.rule, _taught(rows), *where)

    def of_logits(self, logits: Logits) -> Tensor:
        """From those logits alone that the teacher's rows have entries for."""
        setting, where = logits.setting, (logits.logits, logits.positions)
        how = setting.weight, setting.temperature
        return fused_distillation(setting.rule, logits.teacher(), *where, *how, logits.vocab_size)


@dataclass(frozen=True)
class TeacherToProposal(TokenLoss):
    """KL(teacher‖proposal): what there is to learn."""

    def of_rows(self, rows: Rows) -> Tensor:
        """See the class."""
        taught = _taught(rows)
        return sampled_distillation(taught.logt, taught.logp, taught.logc)


@dataclass(frozen=True)
class TeacherAlone(TokenLoss):
    """−log-probability of the answer's token by the teacher."""

    def of_rows(self, rows: Rows) -> Tensor:
        """The answer's token is the first entry."""
        return -_taught(rows).logt[:, 0]


@dataclass(frozen=True)
class Taught(Objective):
    """KL(teacher‖aligned). It stands for `likelihood` beside a teacher, and has no name to choose it by."""

    name: ClassVar[str] = "likelihood"
    likely: ClassVar[bool] = True
    residual: ClassVar[bool] = True

    sft_weight: float | None = option(None, "as in likelihood", low=0)

    def settle(self, setting: Setting) -> Self:
        """No regulariser unless it is asked for."""
        refuse_beside_powers(setting, self.sft_weight)
        return dataclasses.replace(self, sft_weight=self.sft_weight or 0.0)

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """As `likelihood`."""
        return ("product", "geometric")

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """The divergence from the teacher."""
        return (TeacherToAligned(),)

    def loss(self, batch: Batch) -> Tensor:
        """The sum over tokens."""
        loss = batch.sum(batch.tokens(TeacherToAligned())) / batch.mean_length
        if self.sft_weight and batch.training:
            loss = loss + self.sft_weight * batch.sum(batch.tokens(LanguageModel())) / batch.mean_length
        return loss

    def tuned(self, setting: Setting) -> TokenLoss:
        """The divergence from the teacher, in place of the answers' likelihood."""
        return TeacherToAligned()

    def figures(self, setting: Setting) -> Mapping[str, TokenLoss]:
        """How far the aligned model and the proposal are from the teacher, and the teacher's own NLL."""
        return {
            "kl_teacher_aligned": TeacherToAligned(),
            "kl_teacher_proposal": TeacherToProposal(),
            "nll_teacher": TeacherAlone(),
        }
