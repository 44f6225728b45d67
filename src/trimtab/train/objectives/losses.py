"""Losses of tokens that several objectives share: −log-probabilities by the aligner alone, and as they are decoded."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.logprobs import gather, log_normalize
from trimtab.core.objectives import likelihood, sft
from trimtab.core.rules import Geometric, Mixture, Product
from trimtab.errors import InvalidOption
from trimtab.train.fused_likelihood import fused_likelihood, fused_sft
from trimtab.train.objectives.seen import Logits, Rows, Setting, TokenLoss

__all__ = [
    "Alone",
    "Decoded",
    "LanguageModel",
    "is_plain",
    "refuse_beside_head",
    "refuse_beside_powers",
]


def refuse_beside_powers(setting: Setting, sft_weight: float | None) -> None:
    """Refuse what cannot be trained by a teacher's rows, which are learnt under a product of powers.

    Raises:
        InvalidOption: another rule, or a regulariser of a head.
    """
    if not isinstance(setting.rule, (Product, Geometric)):
        raise InvalidOption(f"teacher_prompt is learnt under product or geometric, and not under '{setting.rule}'")
    refuse_beside_head(setting, sft_weight)


def refuse_beside_head(setting: Setting, sft_weight: float | None) -> None:
    """Refuse a regulariser of a head.

    Raises:
        InvalidOption: there is one.
    """
    if setting.head and sft_weight:
        raise InvalidOption("sft_weight: at weight 1 the likelihood of a head is that of its own row already: leave it out")


def is_plain(setting: Setting) -> bool:
    """Whether what is decoded is the aligner's own row, as it is at weight 1 of these: no proposal's row is needed."""
    return isinstance(setting.rule, (Geometric, Mixture)) and setting.weight == 1 and setting.temperature == 1


@dataclass(frozen=True)
class Alone(TokenLoss):
    """−log q, by the aligner alone at its temperature."""

    def of_rows(self, rows: Rows) -> Tensor:
        """See the class."""
        return sft(rows.logq, rows.tokens)


@dataclass(frozen=True)
class LanguageModel(TokenLoss):
    """−log q at temperature 1, whatever the aligner is decoded at."""

    def of_rows(self, rows: Rows) -> Tensor:
        """See the class."""
        if rows.setting.temperature == 1:
            return sft(rows.logq, rows.tokens)
        return -gather(log_normalize(rows.setting.temperature * rows.logq), rows.tokens)

    def of_logits(self, logits: Logits) -> Tensor:
        """Without a row but the one for the gradient."""
        return fused_sft(logits.logits, logits.positions, logits.tokens, logits.vocab_size)


@dataclass(frozen=True)
class Decoded(TokenLoss):
    """−log of the rule's target: the exact negative log-likelihood of what is decoded."""

    reads_proposal: ClassVar[bool] = True

    def of_rows(self, rows: Rows) -> Tensor:
        """See the class."""
        return likelihood(rows.setting.rule, rows.logp, rows.logq, rows.setting.weight, rows.tokens)

    def of_logits(self, logits: Logits) -> Tensor:
        """From compressed rows; where the target is the aligner's own row, from no rows."""
        setting, where = logits.setting, (logits.logits, logits.positions)
        if is_plain(setting):
            return fused_sft(*where, logits.tokens, logits.vocab_size)
        how = setting.weight, setting.temperature
        return fused_likelihood(setting.rule, logits.proposal(), *where, *how, logits.vocab_size)
