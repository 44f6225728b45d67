"""What the flags of `trimtab eval` stand for: prompts, systems, judges and models, checked before any of them is asked."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab.data.options import check_chats
from trimtab.data.records import read_records
from trimtab.data.template import pick_date, refuse_idle_date
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.options import load_aligned_model, make_sampling_params, places_that_fit
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits, without_password
from trimtab.errors import DataError, EndpointError, InvalidOption, InvalidRequest
from trimtab.evaluate.alpaca import read_outputs
from trimtab.evaluate.checks import check_data, check_flags
from trimtab.evaluate.contests import slug
from trimtab.evaluate.options import EvalOptions, is_url
from trimtab.evaluate.run import NULL_SEED, Bench, Plan, bare_proposal, run_evaluation
from trimtab.evaluate.sweep import Setting, sweep
from trimtab.evaluate.systems import Prompts, System, answer_from_file, check_answerable, parse_system, show_prompt
from trimtab.files import expand_home, json_digest, read_json, write_json
from trimtab.judges.base import Judge
from trimtab.judges.budget import Budget
from trimtab.judges.endpoint import EndpointJudge
from trimtab.judges.references import METRICS, ReferenceMetric
from trimtab.judges.reward import load_reward_model
from trimtab.judges.scoring import ReferenceJudge, RewardJudge
from trimtab.models.environment import describe_environment
from trimtab.models.fingerprint import fingerprint_of
from trimtab.models.huggingface import describe_kernels

__all__ = ["evaluate", "make_judges", "make_settings", "name_system", "read_prompts"]

logger = logging.getLogger(__name__)

RUN = "run.json"
"""The file in the output folder that keeps the date of a run, which chat templates may write."""
DENIED = (401, 403)
"""What an endpoint answers to whom it does not know."""


def evaluate(options: EvalOptions, amend: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda results: {}) -> dict[str, Any]:
    """Set everything up, sweep if that is asked for, and compare; `amend` adds sections to the results."""
    assert options.out is not None
    baseline, system = systems = name_system(options.baseline, "baseline"), name_system(options.system, "system")
    check_flags(options, baseline, system)
    params = make_sampling_params(options, seed=options.seed)
    settings = make_settings(options, params)
    limits = Limits(options.concurrency, options.request_timeout, options.max_retries)
    judges = make_judges(options, limits)
    out, frontier = Path(options.out), None
    date = pick_date(options.date, _kept_date(out))
    prompts, development = read_prompts(options, baseline)
    check_chats(options, prompts.prompts)
    loaded = [judge for judge in judges if not isinstance(judge, str)]
    check_data(options, systems, prompts, loaded)
    if development is not None:
        check_data(options, systems, development, loaded, reported=False)
    for one in systems:
        if one.kind == "endpoint":
            _reach(one.where, one.model, limits)
    model = _model(options, systems, params, date)
    if model is not None:
        prompts = _that_fit(options, model, prompts)
        development = development and _that_fit(options, model, development)
        _check_prompts(model, systems, params, [prompts, development or prompts])
    judges = [_reward_judge(judge, options, prompts, date) if isinstance(judge, str) else judge for judge in judges]
    readers = [judge.model.tokenizer for judge in judges if isinstance(judge, RewardJudge)]
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
        record=_record(options, systems, prompts, model, params),
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


def _model(options: EvalOptions, systems: Sequence[System], params: SamplingParams, date: str) -> AlignedModel | None:
    """The models in this process; None if no system needs them."""
    if not any(one.here for one in systems):
        return None
    model: AlignedModel = load_aligned_model(options, options, date)
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


def read_prompts(options: EvalOptions, baseline: System) -> tuple[Prompts, Prompts | None]:
    """The prompts to report on, and the development prompts of a sweep."""
    if options.dataset is not None:
        prompts = _read(options.dataset, options)
    else:
        _, prompts, _ = answer_from_file(baseline, None)
    prompts = prompts.pick(range(min(options.max_prompts or len(prompts), len(prompts))))
    prompts = _as_chats(prompts) if options.apply_chat_template else prompts
    if not options.sweep_weight:
        return prompts, None
    if options.dev_dataset is None:
        return _split(prompts, options.dev_fraction)
    development = _read(options.dev_dataset, options)
    development = _as_chats(development) if options.apply_chat_template else development
    reported = set(map(show_prompt, prompts.prompts))
    kept = [i for i, prompt in enumerate(development.prompts) if show_prompt(prompt) not in reported]
    if len(kept) < len(development):
        logger.warning("%d prompts of --dev_dataset are reported on, and left out of it", len(development) - len(kept))
    if not kept:
        raise DataError(f"{options.dev_dataset}: every prompt is also one that is reported on")
    return prompts, development.pick(kept)


def _split(prompts: Prompts, fraction: float) -> tuple[Prompts, Prompts]:
    """Prompts to report on and to tune on, by the prompt's text: the same text is never on both sides."""
    hashes = [hashlib.sha256(show_prompt(prompt).encode(errors="replace")).hexdigest() for prompt in prompts.prompts]
    distinct = sorted(set(hashes))
    chosen = set(distinct[: round(fraction * len(distinct))])
    sides: tuple[list[int], list[int]] = ([], [])
    for i, digest in enumerate(hashes):
        sides[digest in chosen].append(i)
    if not all(sides):
        raise InvalidOption(f"--dev_fraction {fraction:g} of {len(distinct)} different prompts leaves one side empty")
    return prompts.pick(sides[0]), prompts.pick(sides[1])


def _read(dataset: str, options: EvalOptions) -> Prompts:
    if Path(dataset).name.endswith((".json", ".json.gz")):
        rows = read_outputs(dataset, need_output=False)
        sources = [f"{dataset} entry {i}" for i in range(1, len(rows) + 1)]
        return Prompts([row["instruction"] for row in rows], [row["output"] for row in rows], sources)
    records = read_records(dataset, need="prompt", how=options)
    return Prompts([r.prompt for r in records], [_text(r.chosen) for r in records], [r.source for r in records])


def _text(answer: Any) -> str | None:
    """A wanted answer as a text; None if there is none."""
    if answer is None or isinstance(answer, str):
        return answer
    content = answer[-1]["content"] if answer else None
    return None if content is None else str(content)


def _as_chats(prompts: Prompts) -> Prompts:
    asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts.prompts]
    return dataclasses.replace(prompts, prompts=asked)


def make_judges(options: EvalOptions, limits: Limits, *, reach: bool = True) -> list[Any]:
    """The judges, of which endpoints must answer if `reach`; where one is a reward model, its folder or hub id."""
    judges: list[Any] = []
    for spec in options.judge:
        if is_url(spec):
            budget = Budget(options.prompt_price, options.completion_price, options.max_cost)
            url, _, model = spec.partition("#")
            settings: dict[str, Any] = {"criterion": options.criterion, "orders": options.orders, "limits": limits}
            judge = EndpointJudge(url, model or None, max_tokens=options.judge_max_tokens, budget=budget, **settings)
            judge.model = _reach(url, judge.model, limits) if reach else judge.model
            judges.append(judge)
        elif spec in METRICS:
            judges.append(ReferenceJudge(ReferenceMetric(spec, tokenizer=options.rouge_tokenizer if spec != "chrf" else None)))
        else:
            judges.append(spec)
    names = [Path(judge).name if isinstance(judge, str) else judge.name for judge in judges]
    files = list(map(slug, names))
    if len(set(files)) < len(files):
        twice = names[files.index(max(files, key=files.count))]
        raise InvalidOption(
            f"--judge: two are called '{twice}', and their results could not be told apart: use a folder for each"
        )
    return judges


def _reward_judge(spec: str, options: EvalOptions, prompts: Prompts, date: str) -> Judge:
    """The reward model that a user names, which can take the prompts."""
    model = load_reward_model("--judge", spec, prompts.prompts, prompts.sources, options.dtype, options.device, date)
    return RewardJudge(model, Path(spec).name)


def _reach(url: str, model: str | None, limits: Limits) -> str:
    """The model's name at an endpoint that answers: the given one, or the first that is listed.

    Raises:
        EndpointError: it does not answer, or not to us. That is said soon: only a long run is worth many tries.
    """
    soon = dataclasses.replace(
        limits, max_retries=min(limits.max_retries, 2), request_timeout=min(limits.request_timeout, 30.0)
    )
    with Endpoints([url], soon) as endpoints:
        try:
            listed = endpoints.pick_model()
        except EndpointError as error:
            if model is None or error.status in (None, *DENIED):
                raise
            return model  # a server that does not list its models
    return model or str(listed["id"])


def _record(
    options: EvalOptions, systems: Sequence[System], prompts: Prompts, model: AlignedModel | None, params: SamplingParams
) -> dict[str, Any]:
    """Where every figure comes from."""
    asked = {
        field.name: _to_record(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    }
    path = options.dataset or options.baseline
    shown = zip(prompts.prompts, prompts.references, strict=True)
    data: dict[str, Any] = {"path": path, "sha256": _sha256(path) or json_digest(shown)}
    if any(map(is_url, options.judge)):
        data["criterion"] = options.criterion
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": asked,
        "dataset": data,
        "systems": {
            name: {key: _to_record(value) for key, value in dataclasses.asdict(one).items() if value} | _file_hash(one)
            for name, one in zip(("baseline", "system"), systems, strict=True)
        },
        "sampling": {"seed": params.seed, "seed_of_null": (params.seed or 0) + NULL_SEED, "params": repr(params)},
        "environment": describe_environment(),
    }
    if model is not None:
        shaping = model.shaping(params)
        sources = {"proposal": (options.proposal, model.proposal)}
        sources |= {f"aligner {name}": (name, part) for name, part in zip(options.aligner, model.aligners, strict=True)}
        record["models"] = {
            name: {
                "source": source,
                "weights": fingerprint_of(part),
                "revision": _revision(part),
                "kernels": describe_kernels(part),
            }
            for name, (source, part) in sources.items()
        }
        record["decoding"] = {"rule": str(shaping.rule), "weight": list(shaping.weights)}
    return record


def _to_record(value: Any) -> Any:
    """An option's value as JSON that anybody may read."""
    if isinstance(value, tuple):
        return list(map(_to_record, value))
    return without_password(value) if isinstance(value, str) else value


def _sha256(path: str) -> str | None:
    """Of a file; None if it is none, but a data set of the hub."""
    file = expand_home(path)
    if not file.is_file():
        return None
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file_hash(system: System) -> dict[str, Any]:
    return {"sha256": _sha256(system.where)} if system.kind == "file" else {}


def _revision(model: Any) -> str | None:
    """The hub's commit that the weights were loaded from; of an adapter in a pool, its base's."""
    files = getattr(getattr(model, "pool", model), "files", None)
    return None if files is None else files.commit
