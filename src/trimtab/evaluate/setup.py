"""What the options of an evaluation stand for: prompts, systems, judges and models, checked before any of them is asked."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.options import check_chats
from trimtab.data.template import pick_date, refuse_idle_date
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.options import load_aligned_model, make_sampling_params, places_that_fit
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.reach import reach
from trimtab.endpoints.settings import Limits
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.evaluate.checks import check_data, check_flags
from trimtab.evaluate.contests import slug
from trimtab.evaluate.options import EvalOptions
from trimtab.evaluate.prompts import read_prompts
from trimtab.evaluate.record import make_record
from trimtab.evaluate.run import Bench, Plan, bare_proposal, run_evaluation
from trimtab.evaluate.sweep import Setting, sweep
from trimtab.evaluate.systems import Prompts, System, check_answerable, parse_system
from trimtab.files import read_json, write_json
from trimtab.judges.base import Judge
from trimtab.judges.kinds import make_judge
from trimtab.rewriting.options import Rewriting, load_rewriter

__all__ = ["compare", "make_judges", "make_settings", "name_system"]

logger = logging.getLogger(__name__)

RUN = "run.json"
"""The file in the output folder that keeps the date of a run, which chat templates may write."""


def compare(
    options: EvalOptions,
    out: Path,
    model: AlignedModel | None = None,
    amend: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda results: {},
) -> dict[str, Any]:
    """Set everything up, sweep if that is asked for, and compare.

    Args:
        options: what to compare, and how.
        out: the folder to write.
        model: the models, where they are loaded already.
        amend: gives further sections from the results so far.

    Returns:
        What `results.json` holds, and `out`.

    Raises:
        InvalidOption: options that cannot be, or contradict each other, or name what does not fit.
        DataError, ModelError: data or models that cannot be read or used.
        EndpointError: an endpoint that does not answer.
        BudgetExceeded: a judge would cost more than it may; what is complete has been written.
    """
    baseline, system = systems = name_system(options.baseline, "baseline"), name_system(options.system, "system")
    check_flags(options, baseline, system, model)
    params = make_sampling_params(options, seed=options.seed)
    settings = make_settings(options, params)
    limits = Limits(options.concurrency, options.request_timeout, options.max_retries)
    judges = make_judges(options)
    for judge in judges:
        judge.reach()
    frontier, rewriting = None, None
    date = pick_date(options.date or (None if model is None else model.encoder.date), _kept_date(out))
    prompts, development = read_prompts(options, baseline, columns=any(judge.reads_columns for judge in judges))
    check_chats(options, prompts.prompts)
    check_data(options, systems, prompts, judges)
    if development is not None:
        check_data(options, systems, development, judges, reported=False)
    for one in systems:
        if one.kind == "endpoint":
            reach(one.where, one.model, limits)
    if options.rewriter is not None:
        rewriting = Rewriting(load_rewriter(options, options, date), options)
    model = _model(options, systems, params, date, model)
    if model is not None:
        prompts = _that_fit(options, model, prompts)
        development = development and _that_fit(options, model, development)
        _check_prompts(model, systems, params, [prompts, development or prompts])
    for judge in judges:
        judge.load(prompts, date)
    readers = [judge.tokenizer for judge in judges if judge.tokenizer is not None]
    refuse_idle_date(options.date, *readers, *([] if model is None else [model.tokenizer]))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RUN, {"date": date})
    if development is not None:
        with Bench(out, model, limits) as bench:
            params, frontier = sweep(bench, judges[0], baseline, development, params, settings, options.max_kl)
    plan = Plan(
        prompts,
        baseline,
        system,
        judges,
        params,
        out,
        model,
        limits,
        null=options.null,
        references=options.references,
        length_control=options.length_control,
        record=make_record(options, systems, prompts, model, params),
        rewriting=rewriting,
    )
    return run_evaluation(plan, frontier, amend) | {"out": options.out}


def _kept_date(out: Path) -> Any:
    """The date of the run that is in a folder; None if none is.

    Raises:
        InvalidOption: the folder holds something else's `run.json`, such as that of a training run.
    """
    kept = read_json(out / RUN) if (out / RUN).is_file() else {}
    if not isinstance(kept, dict) or set(kept) - {"date"}:
        raise InvalidOption(f"--out {out} holds a run of another command: name another folder")
    return kept.get("date")


def name_system(text: str, flag: str) -> System:
    try:
        return parse_system(text)
    except InvalidOption as error:
        raise InvalidOption(f"--{flag}: {error}") from error


def make_settings(options: EvalOptions, params: SamplingParams) -> list[Setting]:
    """The points of a sweep."""
    rules: Sequence[str | None] = options.sweep_rule or (None,)
    settings = list(dict.fromkeys(Setting(rule, weight) for rule in rules for weight in options.sweep_weight))
    for setting in settings:
        try:
            dataclasses.replace(params, weight=setting.weight)
        except InvalidRequest as error:
            raise InvalidOption(f"--sweep_weight: {error}") from error
    return settings


def _model(
    options: EvalOptions, systems: Sequence[System], params: SamplingParams, date: str, loaded: AlignedModel | None
) -> AlignedModel | None:
    """The models in this process; None if no system needs them."""
    if not any(one.here for one in systems):
        return None
    model: AlignedModel = loaded or load_aligned_model(options, options, date)
    try:
        model.shaping(params)
    except InvalidRequest as error:
        raise InvalidOption(str(error)) from error
    return model


def _that_fit(options: EvalOptions, model: AlignedModel, prompts: Prompts) -> Prompts:
    """Those that fit into the context, if only they are wanted."""
    return prompts.pick(places_that_fit(options, model, prompts.prompts, [None] * len(prompts), prompts.sources))


def _check_prompts(model: AlignedModel, systems: Sequence[System], params: SamplingParams, asked: Sequence[Prompts]) -> None:
    """Refuse what a system in this process cannot take."""
    for one in systems:
        if one.here:
            answering = model if one.kind == "aligned" else bare_proposal(model)
            for prompts in asked:
                check_answerable(answering, prompts, params)


def make_judges(options: EvalOptions) -> list[Judge]:
    """The judges, checked; nobody is asked and nothing loaded.

    Raises:
        InvalidOption: one is none, does not fit the options, or has the name of another.
    """
    settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    judges = [judge if isinstance(judge, Judge) else make_judge(judge, settings) for judge in options.judge]
    for judge in judges:
        if not isinstance(getattr(judge, "name", None), str):
            raise InvalidOption(f"--judge: {type(judge).__name__} needs a text 'name', see trimtab.judges.base.Judge")
    names = [judge.name for judge in judges]
    files = list(map(slug, names))
    if len(set(files)) < len(files):
        twice = names[files.index(max(files, key=files.count))]
        raise InvalidOption(
            f"--judge: two are called '{twice}', and their results could not be told apart: use a folder for each"
        )
    return judges
