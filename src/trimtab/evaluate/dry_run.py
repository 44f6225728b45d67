"""`trimtab eval --dry_run`: what would be compared, asked and loaded. No endpoint is asked, and no weights are read."""

from pathlib import Path
from typing import Any

from trimtab.data.at_hand import why_not_at_hand
from trimtab.data.records import parse_columns
from trimtab.decode.options import make_sampling_params
from trimtab.endpoints.settings import Limits
from trimtab.evaluate.checks import check_data, check_flags
from trimtab.evaluate.options import EvalOptions, is_url
from trimtab.evaluate.setup import make_judges, make_settings, name_system, read_prompts
from trimtab.evaluate.systems import System
from trimtab.models.estimates import aligner_weights, describe_model, describe_size, model_weights

__all__ = ["rehearse", "render_rehearsal"]


def rehearse(options: EvalOptions) -> dict[str, Any]:
    """Check everything that can be without a network, and count."""
    baseline, system = systems = _system(options.baseline, "baseline"), _system(options.system, "system")
    check_flags(options, baseline, system)
    parse_columns(options.columns)
    params = make_sampling_params(options, seed=options.seed)
    settings = make_settings(options, params)
    limits = Limits(options.concurrency, options.request_timeout, options.max_retries)
    judges = make_judges(options, limits, reach=False)
    missing = [why for name in _sources(options, systems) if (why := why_not_at_hand(name))]
    count = options.expected_examples
    if not missing:
        prompts, _ = read_prompts(options, baseline)
        check_data(options, systems, prompts, [judge for judge in judges if not isinstance(judge, str)])
        count = len(prompts)
    elif count is not None:
        count = min(count, options.max_prompts or count)
    pairs = 1 + (options.null and baseline.kind != "file") + (options.references and baseline.kind != "references")
    asked = None if count is None else count * pairs * (2 if options.orders == "both" else 1)
    models = []
    if any(one.here for one in systems):
        models = [model_weights(options.proposal, options.expected_proposal, options.dtype)]
        dtype = options.aligner_dtype or options.dtype
        models += [aligner_weights(name, options.expected_aligner, dtype) for name in options.aligner]
    return {
        "dry_run": True,
        "out": options.out,
        "data": {"at_hand": not missing, "why_not": missing[0] if missing else None, "prompts": count},
        "systems": {"baseline": options.baseline, "system": options.system},
        "judges": list(options.judge),
        "most_questions": {spec: asked for spec in options.judge if is_url(spec)},
        "sweep": len(settings),
        "models": models,
    }


def render_rehearsal(report: dict[str, Any]) -> str:
    """In words."""
    data, systems = report["data"], report["systems"]
    there = "at hand" if data["at_hand"] else f"not at hand: {data['why_not']}"
    count = "not known" if data["prompts"] is None else f"{data['prompts']:,}"
    lines = [f"would compare {systems['system']} with {systems['baseline']}, into {report['out']}"]
    lines.append(f"prompts   {count}; {there}")
    for judge in report["judges"]:
        asked = report["most_questions"].get(judge)
        lines.append(f"judge     {judge}" + ("" if asked is None else f", at most {asked:,} questions"))
    if report["sweep"]:
        lines.append(f"sweep     {report['sweep']} settings on development prompts, judged besides")
    for model in report["models"]:
        lines += [f"model     {describe_model(model)}", f"          {describe_size(model)}"]
    return "\n".join(lines)


def _system(text: str, flag: str) -> System:
    """A system; a file of outputs may be there later."""
    if text.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")) and why_not_at_hand(text):
        return System("file", Path(text).stem, text)
    return name_system(text, flag)


def _sources(options: EvalOptions, systems: tuple[System, System]) -> list[str]:
    """Everything that is read."""
    named = [options.dataset, options.dev_dataset, *(one.where for one in systems if one.kind == "file")]
    return [name for name in named if name]
