"""Compare two systems: their answers, what judges say of them, how far the aligned model has moved, and a report.

Everything goes into one folder:

    outputs/NAME.json             each system's answers, as AlpacaEval reads them
    annotations/JUDGE-PAIR.json   each judge's preferences, likewise
    results.json                  every figure, and what it was made of
    report.html                   the same to look at, with every prompt side by side
    answers.jsonl, judgements.jsonl   what models wrote and judges said: a run that is started again goes on from there
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trimtab.data.prompts import Prompt, is_chat, show_prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.settings import Limits
from trimtab.errors import DeadRow
from trimtab.evaluate.alpaca import write_outputs
from trimtab.evaluate.contests import Contest, judge_contests, slug
from trimtab.evaluate.distribution import Trace, pieces, summarise, trace
from trimtab.evaluate.likelihood import held_out
from trimtab.evaluate.report import write_report
from trimtab.evaluate.systems import (
    Answers,
    Prompts,
    System,
    answer_from_file,
    answer_here,
    answer_remotely,
    rewrite_answers,
)
from trimtab.evaluate.texts import describe_handovers, describe_texts, distinct_at_equal_length
from trimtab.files import write_json
from trimtab.journal import Journal
from trimtab.judges.base import Judge, Judgement
from trimtab.rewriting.options import Rewriting

__all__ = ["NULL_SEED", "Bench", "Plan", "bare_proposal", "run_evaluation"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

NULL_SEED = 1_000_003
"""Added to the seed where a system answers again; more than there are prompts."""


@dataclass(frozen=True)
class Plan:
    """What to compare, and how.

    Attributes:
        prompts: what is asked; None takes what the baseline's file answers.
        baseline, system: who answers. Win rates are the system's.
        judges: who compares; none for the figures that need no judge.
        params: how models here and at endpoints sample, with a seed.
        out: the folder to write.
        model: the models in this process, if a system needs them.
        limits: how much to ask of a system's endpoint.
        null: also judge the baseline against itself with another seed.
        references: also judge the data's own answers against the baseline.
        length_control: see `trimtab.evaluate.length.control_length`.
        record: further facts for the record: what the user asked for.
        rewriting: what rewrites answers, if something does.
    """

    prompts: Prompts | None
    baseline: System
    system: System
    judges: Sequence[Judge]
    params: SamplingParams
    out: Path
    model: AlignedModel | None = None
    limits: Limits = field(default_factory=Limits)
    null: bool = True
    references: bool = True
    length_control: str = "auto"
    record: Mapping[str, Any] = field(default_factory=dict)
    rewriting: Rewriting | None = None


class Bench:
    """Where systems answer and judges judge: the models and the two journals. A context manager.

    Args:
        out: the folder.
        model: the models in this process.
        limits: for a system's endpoint.
        rewriting: what rewrites answers, if something does.
    """

    def __init__(self, out: Path, model: AlignedModel | None, limits: Limits, rewriting: Rewriting | None = None) -> None:
        self.out, self.model, self.limits, self._rewriting = out, model, limits, rewriting
        self.failed = 0
        """Answers so far that could not go on."""
        self._answers, self.judgements = Journal(out / "answers.jsonl"), Journal(out / "judgements.jsonl")

    def __enter__(self) -> "Bench":
        self._answers.__enter__()
        try:
            self.judgements.__enter__()
        except BaseException as error:
            self._answers.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.judgements.__exit__(*error)
        self._answers.__exit__(*error)

    def answer(
        self, system: System, prompts: Prompts | None, params: SamplingParams, name: str = ""
    ) -> tuple[Answers, Prompts, str]:
        """A system's answers, the prompts that they are to, and its name.

        Raises:
            DataError, EndpointError, InvalidRequest: it cannot answer.
        """
        answers, prompts, name = self._answer(system, prompts, params, name or system.name)
        if died := len(answers.died):
            self.failed += died
            logger.warning("%s: %d of %d answers ended in an error, and are left out", name, died, len(prompts))
        return answers, prompts, name

    def _answer(
        self, system: System, prompts: Prompts | None, params: SamplingParams, name: str
    ) -> tuple[Answers, Prompts, str]:
        if system.rewritten:
            plain = dataclasses.replace(system, rewritten=False)
            answers, prompts, name = self._answer(plain, prompts, params, name.removeprefix("rewritten "))
            assert self._rewriting is not None
            return rewrite_answers(self._rewriting, answers, prompts, params, self._answers), prompts, f"rewritten {name}"
        if system.kind == "file":
            return answer_from_file(system, prompts)
        assert prompts is not None
        if system.kind == "references":
            return Answers([text or "" for text in prompts.references]), prompts, name
        bare = dataclasses.replace(params, rule=None, weight=None)
        if system.kind == "endpoint":
            answers, listed = answer_remotely(system, prompts, bare, self._answers, self.limits)
            return answers, prompts, listed
        assert self.model is not None
        if system.kind == "aligned":
            return answer_here(self.model, prompts, params, self._answers, name), prompts, name
        return answer_here(bare_proposal(self.model), prompts, bare, self._answers, name), prompts, name


def bare_proposal(model: AlignedModel) -> AlignedModel:
    """The proposal alone, without the settings that were made for its aligners."""
    parts = model.proposal, (), model.tokenizer, model.eos_token_ids
    return AlignedModel(*parts, max_num_seqs=model.max_num_seqs, date=model.encoder.date)


def run_evaluation(
    plan: Plan,
    frontier: Mapping[str, Any] | None = None,
    amend: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda results: {},
) -> dict[str, Any]:
    """Answer, judge, measure, and write everything to `plan.out`.

    Args:
        plan: what to do.
        frontier: what a sweep found, see `trimtab.evaluate.sweep`.
        amend: further sections, from the results so far.

    Returns:
        What `results.json` holds.

    Raises:
        BudgetExceeded: a judge would cost more than it may; what is complete has been written.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    with Bench(plan.out, plan.model, plan.limits, plan.rewriting) as bench:
        first, prompts, name_1 = bench.answer(plan.baseline, plan.prompts, plan.params)
        second, prompts, name_2 = bench.answer(plan.system, prompts, plan.params)
        name_2 = _unlike(name_2, name_1)
        contests = [Contest("main", name_1, first.texts, name_2, second.texts, first.died | second.died)]
        repeated: dict[str, Answers] = {}
        if plan.null and plan.baseline.can_repeat and plan.judges:
            again = dataclasses.replace(plan.params, seed=(plan.params.seed or 0) + NULL_SEED)
            null_name = _unlike(f"{name_1}, another seed", name_1, name_2)
            repeated[null_name] = other = bench.answer(plan.baseline, prompts, again, name=null_name)[0]
            contests.append(Contest("null", name_1, first.texts, null_name, other.texts, first.died | other.died))
        wanted = [text or "" for text in prompts.references]
        if plan.references and any(wanted) and "references" not in (plan.baseline.kind, plan.system.kind):
            contests.append(Contest("references", name_1, first.texts, "references", wanted, first.died))
        judging, opinions, stopped = judge_contests(
            plan.judges, contests, prompts, bench.judgements, plan.out, plan.length_control
        )
    answers = {name_1: first, name_2: second}
    traces = {name: _traces(plan, prompts, one) for name, one in answers.items()}
    results: dict[str, Any] = {
        "title": f"{name_2} against {name_1}",
        "systems": {"baseline": name_1, "system": name_2},
        "dataset": {"prompts": len(prompts), **plan.record.get("dataset", {})},
        "judging": judging,
        "texts": _describe_texts(answers),
        **_distribution(plan, {name_1: plan.baseline, name_2: plan.system}, traces),
        **_likelihood(plan, prompts),
        **({"speed": speeds} if (speeds := {name: one.speed for name, one in answers.items() if one.speed}) else {}),
        **({"frontier": frontier} if frontier is not None else {}),
        **({"stopped": str(stopped)} if stopped is not None else {}),
        "provenance": {"judges": {judge.name: _describe_judge(judge) for judge in plan.judges}, **plan.record},
    }
    results["failed"] = bench.failed + (frontier or {}).get("failed", 0) + results.get("likelihood", {}).get("failed", 0)
    results |= amend(results)
    _write_outputs(plan, prompts, {**answers, **repeated})
    write_json(plan.out / "results.json", results)
    write_report(plan.out / "report.html", results, _items(plan, prompts, answers, traces, opinions))
    if stopped is not None:
        raise stopped
    return results


def _describe_judge(judge: Judge) -> dict[str, Any]:
    cost = judge.cost()
    return dict(judge.describe()) | ({} if cost is None else {"cost": dict(cost)})


def _traces(plan: Plan, prompts: Prompts, answers: Answers) -> list[Trace | None]:
    """What the aligners do at each token of each answer; None where that cannot be said, or the answer died."""
    model = plan.model
    found: list[Trace | None] = [None] * len(prompts)
    if model is None or not model.aligners or not model.shaping(plan.params).rule.has_row:
        return found
    completions: Sequence[Any] = answers.tokens if answers.tokens is not None else answers.texts
    whole = [i for i, completion in enumerate(completions) if completion and i not in answers.died]
    known = [i for i in whole if _fits(model, prompts.prompts[i], completions[i])]
    if not known:
        return found
    try:
        seen: Sequence[Trace | None] = trace(
            model, [prompts.prompts[i] for i in known], [completions[i] for i in known], plan.params
        )
    except DeadRow:  # somewhere on an answer that another system wrote
        seen = [_trace_alone(model, prompts.prompts[i], completions[i], plan.params) for i in known]
    for i, one in zip(known, seen, strict=True):
        found[i] = one
    return found


def _trace_alone(model: AlignedModel, prompt: Any, completion: Any, params: SamplingParams) -> Trace | None:
    try:
        return trace(model, [prompt], [completion], params)[0]
    except DeadRow as error:
        logger.warning("an answer is left out of what the aligners do: %s", error)
        return None


def _unlike(name: str, *taken: str) -> str:
    """The name, numbered if its file would be another's."""
    number, other = 1, name
    while slug(other) in map(slug, taken):
        number += 1
        other = f"{number} {name}"
    return other


def _fits(model: AlignedModel, prompt: Any, completion: Any) -> bool:
    """Whether a completion that another model wrote can be read by these."""
    try:
        model.check_pair(prompt, completion)
    except ValueError:
        return False
    return True


def _distribution(plan: Plan, systems: Mapping[str, System], traces: Mapping[str, list[Trace | None]]) -> dict[str, Any]:
    """Of the aligned model's own answers: elsewhere the sums estimate nothing."""
    found = {}
    for name, system in systems.items():
        known = [one for one in traces[name] if one is not None]
        if system.kind == "aligned" and not system.rewritten and known:
            found[name] = summarise(known)
    return {"distribution": found} if found else {}


def _likelihood(plan: Plan, prompts: Prompts) -> dict[str, Any]:
    """Held-out negative log-likelihood of the references, if there are any and models to score them."""
    model = plan.model
    if model is None or not model.shaping(plan.params).rule.has_row:
        return {}
    wanted = [i for i, text in enumerate(prompts.references) if text]
    some = prompts.pick([i for i in wanted if _fits(model, prompts.prompts[i], prompts.references[i])])
    if not some.prompts:
        return {}
    if len(some) < len(wanted):
        logger.warning("%d references are left out of the likelihood: they do not fit the models", len(wanted) - len(some))
    found = held_out(model, some.prompts, some.references, some.sources, plan.params)
    return {"likelihood": found | {"left_out": len(wanted) - len(some)}}


def _describe_texts(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Of those answers that are some: of each system's own, and for a comparison of those to the prompts that all answered."""
    died = frozenset[int]().union(*(one.died for one in answers.values()))
    equal = distinct_at_equal_length({name: _pick(one.texts, died) for name, one in answers.items()})
    return {
        name: describe_texts(_pick(one.texts, one.died), one.finish_reasons and _pick(one.finish_reasons, one.died))
        | {f"{figure}_at_equal_length": value for figure, value in equal[name].items()}
        | describe_handovers(None if one.handovers is None else _pick(one.handovers, one.died))
        for name, one in answers.items()
    }


def _pick(items: Sequence[T], died: frozenset[int]) -> list[T]:
    return [item for i, item in enumerate(items) if i not in died]


def _write_outputs(plan: Plan, prompts: Prompts, answers: Mapping[str, Answers]) -> None:
    for name, one in answers.items():
        rows = [
            {"instruction": show_prompt(prompt), "output": text, "generator": name, "dataset": "trimtab"}
            | ({"finish_reason": "error"} if i in one.died else {})
            for i, (prompt, text) in enumerate(zip(prompts.prompts, one.texts, strict=True))
        ]
        write_outputs(plan.out / "outputs" / f"{slug(name)}.json", rows)


def _items(
    plan: Plan,
    prompts: Prompts,
    answers: Mapping[str, Answers],
    traces: Mapping[str, list[Trace | None]],
    opinions: Mapping[str, list[Judgement]],
) -> list[dict[str, Any]]:
    """Every prompt, for the report."""
    items = []
    for i, prompt in enumerate(prompts.prompts):
        sides = {}
        for name, one in answers.items():
            sides[name] = {"text": one.texts[i], "tokens": _tokens(plan.model, prompt, one.texts[i], traces[name][i])}
        said = {
            judge: {"preference": j[i].preference, "orders": None if (o := j[i].orders) is None else list(o)}
            for judge, j in opinions.items()
        }
        shown = {"index": i, "instruction": show_prompt(prompt), "reference": prompts.references[i]}
        items.append(shown | {"answers": sides, "judgements": said})
    return items


def _tokens(model: AlignedModel | None, prompt: Prompt, text: str, seen: Trace | None) -> list[list[Any]] | None:
    """An answer token by token, each with its influence; None where that is not known, or the tokens are not the text."""
    if model is None or model.tokenizer is None or seen is None:
        return None
    before = [] if is_chat(prompt) else model.encode_pairs([prompt], [seen.tokens])[0][0]
    coloured = pieces(model.tokenizer, seen.tokens, seen.influence, before)
    return [list(piece) for piece in coloured] if "".join(piece for piece, _ in coloured) == text else None
