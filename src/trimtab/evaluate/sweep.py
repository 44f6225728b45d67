"""Sweep rules and weights on development prompts: how many wins for how much KL, and which to take.

Each point of the frontier is one rule at one weight: the aligned model answers the development prompts, one judge compares
with the baseline, and the rows say how far the model has moved from the proposal. The pick is then tried on other prompts; its
own win rate here is the best of several, and so flatters it.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trimtab.decode.request import SamplingParams
from trimtab.errors import InvalidOption
from trimtab.evaluate.contests import Contest, annotate, judge_contest, slug, write_annotations
from trimtab.evaluate.distribution import summarise, trace
from trimtab.evaluate.run import Bench
from trimtab.evaluate.systems import Prompts, System
from trimtab.evaluate.winrate import summarise_annotations
from trimtab.judges.base import Judge

__all__ = ["Setting", "sweep"]

logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """One point to try; a rule of None is the model's own."""

    rule: str | None
    weight: float


def sweep(
    bench: Bench,
    judge: Judge,
    baseline: System,
    prompts: Prompts,
    params: SamplingParams,
    settings: Sequence[Setting],
    max_kl: float | None = None,
) -> tuple[SamplingParams, dict[str, Any]]:
    """Try every setting, and take the one with the highest win rate.

    Args:
        bench: entered, with models that have one aligner.
        judge: who compares.
        baseline: whom to win against.
        prompts: the development prompts.
        params: how to sample, with a seed.
        settings: what to try.
        max_kl: nats per sequence that a pick may be away from the proposal; None without a limit.

    Returns:
        `params` with the rule and the weight that won, and the frontier: `judge`, `prompts`, `points` with `rule`, `weight`,
        `win_rate`, `win_rate_interval`, `kl_per_token`, `kl_per_sequence` and `picked`, and `failed`, how many answers could
        not go on.

    Raises:
        InvalidOption: a rule has no row whose KL could be measured, or no setting is within `max_kl`.
        BudgetExceeded: the judge would cost more than it may.
    """
    model = bench.model
    assert model is not None
    tried = []
    for setting in settings:
        one = dataclasses.replace(params, rule=setting.rule, weight=setting.weight)
        settled = model.shaping(one).rule
        if not settled.has_row:
            raise InvalidOption(f"sweep_rule: '{settled}' has no row in closed form, so its KL cannot be measured")
        tried.append((one, str(settled), setting.weight))
    first, prompts, name = bench.answer(baseline, prompts, params)
    points: list[dict[str, Any]] = []
    for one, rule, weight in tried:
        label = f"{rule}, weight {weight:g}"
        answers, _, _ = bench.answer(System("aligned", "aligned"), prompts, one, name=label)
        contest = Contest("development", name, first.texts, label, answers.texts, first.died | answers.died)
        judgements = judge_contest(judge, contest, prompts, bench.judgements)
        annotations = annotate(judge.name, contest, prompts, judgements)
        write_annotations(bench.out, annotations, judgements, f"development-{slug(label)}")
        won = summarise_annotations(annotations, length_control="length-only fit", source=f"{judge.name}, {label}")
        assert answers.tokens is not None
        alive = [i for i in range(len(prompts)) if i not in answers.died]
        moved = summarise(trace(model, prompts.pick(alive).prompts, [answers.tokens[i] for i in alive], one))
        figures = {key: won[key] for key in ("n", "missing", "win_rate", "win_rate_interval")}
        figures |= {key: moved[key] for key in ("kl_per_token", "kl_per_sequence", "kl_per_sequence_interval")}
        points.append({"rule": rule, "weight": weight, **figures, "picked": False})
        logger.info("%s: win rate %.1f %%, KL %.3g nats per sequence", label, won["win_rate"], _kl(points[-1]))
    allowed = [i for i, point in enumerate(points) if max_kl is None or _kl(point) <= max_kl]
    if not allowed:
        least = min(map(_kl, points))
        raise InvalidOption(f"max_kl {max_kl:g}: the least of the settings tried is {least:.3g} nats per sequence")
    best = max(allowed, key=lambda i: (points[i]["win_rate"], -_kl(points[i])))
    points[best]["picked"] = True
    frontier = {"judge": judge.name, "split": "development", "prompts": len(prompts), "max_kl": max_kl, "points": points}
    frontier["failed"] = bench.failed
    return tried[best][0], frontier


def _kl(point: Mapping[str, Any]) -> float:
    """Nats per sequence; infinite where a report says None."""
    kl = point["kl_per_sequence"]
    return math.inf if kl is None else float(kl)
