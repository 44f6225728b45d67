"""What a run warns of: options that do not fit together, what was fitted, and what the finished aligner writes.

The yardstick of divergence is the likelihood that it buys. For the best target ∝ p̃·q^λ that a family of aligners has, the
information projection's theorem of Pythagoras says KL(wanted‖p̃) = KL(wanted‖aligned) + KL(aligned‖p̃): a nat of divergence buys
a nat of likelihood. An aligner that moves the proposal further than that is surer than it is right.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trimtab.core.rules import Gate
from trimtab.train.plan import Plan
from trimtab.train.tune import RANGES, Tuned
from trimtab.words import repetition, split_words

__all__ = ["Written", "check_texts", "warn_of_rule", "warn_of_start", "warn_of_weight"]

logger = logging.getLogger(__name__)

DEAR = 2.0
"""Nats of KL(aligned‖p̃) for a nat of likelihood that are too many; 1 is par."""

REPEATS = 0.2
"""So much more repetition than in the wanted answers and in the proposal's, or the teacher's, is a loop."""

RARELY = 0.5
"""A share of answers that do not end, or are empty, which is too large."""


class Written(NamedTuple):
    """One side's answers to some prompts."""

    texts: Sequence[str]
    ended: Sequence[bool]
    """Whether each came to its end within the limit."""

    @property
    def has_words(self) -> list[bool]:
        """Whether each says something."""
        return [bool(split_words(text)) for text in self.texts]


def warn_of_rule(plan: Plan) -> None:
    """Say it where objective and rule do not fit; of a gate, the rule within."""
    fitting, rule = plan.objective.fits(plan.setting), plan.rule
    while isinstance(rule, Gate):
        rule = rule.rule
    if fitting and not {rule.name, plan.rule.name} & set(fitting):
        logger.warning(
            "objective '%s' does not train what rule '%s' decodes; it fits %s",
            plan.asked.objective, plan.asked.rule, " or ".join(fitting),
        )  # fmt: skip


def warn_of_start(exponent: float, bounds: tuple[float, float], started: float, alone: float) -> None:
    """Say it where the aligner's fitted temperature is at its limit, or makes a start that is worse than the proposal.

    Args:
        exponent: of the aligner, the inverse of its temperature.
        bounds: that it was kept within.
        started: the negative log-likelihood of the development answers at the start, in nats a token.
        alone: the proposal's own.
    """
    limit = {bounds[0]: "highest", bounds[1]: "lowest"}.get(exponent)
    if started > alone:
        logger.warning(
            "the aligner as it is harms the proposal, even at its best temperature, %g%s: %.3f nats a token, and the proposal"
            " alone has %.3f; --start uniform starts at the proposal",
            1 / exponent, f", the {limit} allowed" if limit else "", started, alone,
        )  # fmt: skip
    elif limit:
        logger.warning(
            "the aligner's temperature was fitted to %g, the %s allowed: its own probabilities %s; --start uniform starts at"
            " the proposal, and --aligner_temperature sets another",
            1 / exponent, limit, "say little of these answers" if limit == "highest" else "are too flat",
        )  # fmt: skip


def warn_of_weight(plan: Plan, tuned: Tuned) -> None:
    """Say it where the tuned weight is far below the trained one or at its range's end, or its divergence is dear.

    Args:
        plan: of the run.
        tuned: what was found on the development answers; the range begins at 0, which is the proposal.
    """
    rule, trained = plan.rule, plan.weight
    likely = plan.objective.likely
    best, (low, high) = tuned.weight, RANGES[rule.name]
    losses = dict(tuned.tried)
    if not tuned.bound and best == low:
        logger.warning("the tuned weight is %g: the development data are explained best without the aligner", best)
    elif not tuned.bound and best == high > trained:
        logger.warning("the tuned weight, %g, is the largest that is tried: train longer, or at a larger learning rate", best)
    elif not tuned.bound and likely and 0 < best <= trained / 2:
        logger.warning(
            "the tuned weight, %g, is far below the trained one, %g: the aligner learnt the training answers by heart, or"
            " counts the proposal twice; train for fewer steps, at a smaller learning rate, or with more data", best, trained,
        )  # fmt: skip
    gain = losses[low] - losses[best]
    if likely and best != low and tuned.kl > DEAR * max(gain, 0.0):
        ratio = tuned.kl / gain if gain > 0 else math.inf
        logger.warning(
            "the aligned model is %.3f nats a token from the proposal for a gain of %.3f, which is %.1f for one, and par is 1:"
            " it is surer than it is right; give more data or fewer steps, or bound it by --max_kl", tuned.kl, gain, ratio,
        )  # fmt: skip


def check_texts(proposal: Written, aligned: Written, wanted: Written, teacher: Written | None = None) -> dict[str, float]:
    """Figures of greedy answers to development prompts, with a warning where the aligned ones are broken, or their teacher's.

    Args:
        proposal: its answers.
        aligned: the aligned model's.
        wanted: those of the data, cut where the others were.
        teacher: the proposal's behind the teacher's prompt, where it is learnt from one: no better ones can be hoped for.

    Returns:
        Of each side, `repetition_…`: the mean share of 4-grams that are repeated in an answer. Of all but the wanted ones,
        `unended_…` and `empty_…`: the share of answers that go on beyond the limit where the wanted one ends within it, and
        that have no word where it has some. A share of nothing is 0.
    """
    models = {"proposal": proposal} | ({} if teacher is None else {"teacher": teacher}) | {"aligned": aligned}
    figures = {}
    for name, side in (models | {"wanted": wanted}).items():
        figures[f"repetition_{name}"] = repetition([split_words(text) for text in side.texts]) or 0.0
    for name, side in models.items():
        figures[f"unended_{name}"] = _share_not(side.ended, wanted.ended)
        figures[f"empty_{name}"] = _share_not(side.has_words, wanted.has_words)
    names = list(models)
    if broken := _flaws(figures, "aligned", names[:-1]):
        logger.warning(
            "the aligned model's greedy answers to %d development prompts look broken: %s; read `samples` in training.json",
            len(aligned.texts), broken,
        )  # fmt: skip
    if teacher is not None and (broken := _flaws(figures, "teacher", names[:1])):
        logger.warning(
            "the proposal's own greedy answers behind teacher_prompt look broken: %s; what it says there is what is learnt:"
            " mend teacher_prompt, with examples that are shorter, or alike, or more of them", broken,
        )  # fmt: skip
    return figures


def _flaws(figures: Mapping[str, float], name: str, others: Sequence[str]) -> str:
    """What is broken in one side's answers, beside the same figures of others; '' if nothing is."""

    def said(what: str, kind: str, *more: str) -> str:
        beside = ", ".join(f"{other} {figures[f'{kind}_{other}']:.0%}" for other in (*others, *more))
        return f"{figures[f'{kind}_{name}']:.0%} {what} ({beside})"

    found = []
    if figures[f"repetition_{name}"] > max(figures[f"repetition_{other}"] for other in (*others, "wanted")) + REPEATS:
        found.append(said("of the 4-grams in an answer are repeated", "repetition", "wanted"))
    if figures[f"unended_{name}"] >= RARELY:
        found.append(said("do not end where wanted ones do", "unended"))
    if figures[f"empty_{name}"] >= RARELY:
        found.append(said("are empty where wanted ones are not", "empty"))
    return "; ".join(found)


def _share_not(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """How often we do not, of the times when they do."""
    missed = [not mine for mine, yours in zip(ours, theirs, strict=True) if yours]
    return sum(missed) / len(missed) if missed else 0.0
