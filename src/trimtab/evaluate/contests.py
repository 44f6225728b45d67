"""Contests: the two sides that judges compare on every prompt, and what comes of it."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.data.prompts import show_prompt
from trimtab.errors import BudgetExceeded, ModelError
from trimtab.evaluate.alpaca import Annotation, write_outputs
from trimtab.evaluate.intervals import mean_interval
from trimtab.evaluate.systems import Prompts
from trimtab.evaluate.winrate import summarise_annotations
from trimtab.journal import Journal
from trimtab.judges.base import Judge, Judgement, Pair

__all__ = ["Contest", "annotate", "judge_contest", "judge_contests", "slug", "write_annotations"]

logger = logging.getLogger(__name__)

MOST_LETTERS = 60
"""Of a file's name; systems allow 255 bytes, and a letter may have four."""


class Contest(NamedTuple):
    """Two sides that judges compare: `main`, `null` or `references`; but for the prompts that one of them has no answer to."""

    pair: str
    name_1: str
    texts_1: Sequence[str]
    name_2: str
    texts_2: Sequence[str]
    died: frozenset[int] = frozenset()

    def why_not(self, number: int) -> str:
        """Why a pair cannot be compared; '' if it can."""
        if number in self.died:
            return "an answer ended in an error"
        return "no reference" if self.pair == "references" and not self.texts_2[number] else ""


def judge_contest(judge: Judge, contest: Contest, prompts: Prompts, journal: Journal) -> list[Judgement]:
    """One judge's opinion of every prompt's two answers."""
    pairs = [
        Pair(prompt, show_prompt(prompt), one, other, reference, columns)
        for prompt, one, other, reference, columns in zip(
            prompts.prompts,
            contest.texts_1,
            contest.texts_2,
            prompts.references,
            prompts.columns or [{}] * len(prompts),
            strict=True,
        )
    ]
    reasons = [contest.why_not(i) for i in range(len(pairs))]
    asked = [pair for pair, why in zip(pairs, reasons, strict=True) if not why]
    judged = iter(_checked(judge, judge.judge(asked, journal), len(asked)))
    return [Judgement(None, why_missing=why) if why else next(judged) for why in reasons]


def _checked(judge: Judge, given: Sequence[Judgement], count: int) -> Sequence[Judgement]:
    """Refuse what is no opinion of every pair, from a judge of somebody else's."""
    if len(given) != count:
        raise ModelError(f"judge '{judge.name}' must give an opinion of each of {count} pairs, and gave {len(given)}")
    for one in given:
        number: Any = one.preference
        if number is not None and not (isinstance(number, int | float) and 1 <= number <= 2):
            raise ModelError(f"judge '{judge.name}' gave the preference {number!r}: it must be from 1 to 2, or None")
    return given


def annotate(judge: str, contest: Contest, prompts: Prompts, judgements: Sequence[Judgement]) -> list[Annotation]:
    """Judgements in AlpacaEval's terms."""
    return [
        Annotation(judgement.preference, one, other, contest.name_1, contest.name_2, judge, show_prompt(prompt))
        for prompt, one, other, judgement in zip(prompts.prompts, contest.texts_1, contest.texts_2, judgements, strict=True)
    ]


def judge_contests(
    judges: Sequence[Judge], contests: Sequence[Contest], prompts: Prompts, journal: Journal, out: Path, length_control: str
) -> tuple[list[dict[str, Any]], dict[str, list[Judgement]], BudgetExceeded | None]:
    """Put every contest to every judge, and write the annotations.

    Args:
        judges: who judges.
        contests: the main one first.
        prompts: what was asked.
        journal: where opinions are kept.
        out: the folder; `annotations/` in it is written.
        length_control: see `trimtab.evaluate.length.control_length`.

    Returns:
        A row of results for each judge and contest, each judge's opinions of the main one, and, if a judge reached its limit,
        the error that says so.
    """
    rows: list[dict[str, Any]] = []
    opinions: dict[str, list[Judgement]] = {}
    stopped = None
    for judge in judges:
        mine = []
        for contest in contests:
            if judge.by_reference and contest.pair == "references":
                continue  # a reference is as close to itself as can be
            try:
                judgements = judge_contest(judge, contest, prompts, journal)
            except BudgetExceeded as error:
                stopped = error
                logger.warning("%s", error)
                break
            annotations = annotate(judge.name, contest, prompts, judgements)
            write_annotations(out, annotations, judgements, contest.pair)
            mine.append(_row(judge, contest, annotations, judgements, length_control))
            if contest.pair == "main":
                opinions[judge.name] = judgements
        rows += mine
    return rows, opinions, stopped


def _row(
    judge: Judge, contest: Contest, annotations: Sequence[Annotation], judgements: Sequence[Judgement], length_control: str
) -> dict[str, Any]:
    known = {"judge": judge.name, "kind": judge.kind, "pair": contest.pair}
    known |= {"output_1": contest.name_1, "output_2": contest.name_2}
    reasons = [j.why_missing for j in judgements if j.preference is None]
    why = reasons[0] if reasons else ""
    if len(reasons) == len(judgements):
        return known | {"n": 0, "missing": len(reasons), "why_missing": why}
    summary = summarise_annotations(annotations, length_control=length_control, source=f"{judge.name}, {contest.pair}")
    return known | summary | {"position": position_report(judgements), "scores": _scores(judgements), "why_missing": why}


def _scores(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """Mean scores of either side, with intervals, from judges that score."""
    scored = torch.tensor([j.scores for j in judgements if j.scores is not None], dtype=torch.float64)
    if not len(scored):
        return None
    means: dict[str, Any] = {}
    for name, column in zip(("output_1", "output_2"), scored.unbind(1), strict=True):
        means |= {name: column.mean().item(), f"{name}_interval": list(mean_interval(column)) if len(column) > 1 else None}
    return means


def write_annotations(out: Path, annotations: Sequence[Annotation], judgements: Sequence[Judgement], pair: str) -> None:
    """Write `annotations/JUDGE-PAIR.json` in the folder `out`."""
    rows = []
    for annotation, judgement in zip(annotations, judgements, strict=True):
        row = dataclasses.asdict(annotation) | {"dataset": "trimtab"}
        if judgement.orders is not None:
            row["preference_by_order"] = list(judgement.orders)
        if judgement.scores is not None:
            row["scores"] = list(judgement.scores)
        rows.append(row | ({"why_missing": judgement.why_missing} if judgement.why_missing else {}))
    write_outputs(out / "annotations" / f"{slug(annotations[0].annotator)}-{pair}.json", rows)


def slug(name: str) -> str:
    """A name as a file's."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")[:MOST_LETTERS] or "unnamed"


def position_report(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """How much a judge goes by the order, from the pairs it saw in both.

    Returns:
        `first_preferred`: percent, the mean preference for the answer shown first, 50 without bias, and its 95 % bootstrap
        interval, None for a single pair; `consistent`: percent of pairs where both orders favour the same answer. None if no
        pair was seen twice.
    """
    both = [j.orders for j in judgements if j.orders is not None]
    if not both:
        return None
    first = torch.tensor([(2 - one + other - 1) / 2 for one, other in both], dtype=torch.float64)
    low_high = [100 * bound for bound in mean_interval(first)] if len(both) > 1 else None
    same = sum((one - 1.5) * (other - 1.5) > 0 or one == other == 1.5 for one, other in both)
    return {
        "pairs": len(both),
        "first_preferred": 100 * first.mean().item(),
        "first_preferred_interval": low_high,
        "consistent": 100 * same / len(both),
    }
