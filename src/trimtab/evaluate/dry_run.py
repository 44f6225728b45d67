"""`trimtab eval --dry_run`: what would be compared, asked and loaded. No endpoint is asked, and no weights are read."""

from pathlib import Path
from typing import Any

from trimtab.data.at_hand import why_not_at_hand
from trimtab.data.records import parse_columns
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.options import make_sampling_params
from trimtab.evaluate.checks import check_data, check_flags
from trimtab.evaluate.options import EvalOptions
from trimtab.evaluate.prompts import read_prompts
from trimtab.evaluate.setup import make_judges, make_settings, name_system
from trimtab.evaluate.systems import System
from trimtab.models.estimates import aligner_weights, describe_model, describe_size, model_weights

__all__ = ["rehearse", "render_rehearsal"]


def rehearse(options: EvalOptions, model: AlignedModel | None = None) -> dict[str, Any]:
    """Check everything that can be without a network, and count; `model` is what is loaded already."""
    baseline, system = systems = _system(options.baseline, "baseline"), _system(options.system, "system")
    check_flags(options, baseline, system, model)
    parse_columns(options.columns)
    params = make_sampling_params(options, seed=options.seed)
    settings = make_settings(options, params)
    judges = make_judges(options)
    named = [(judge if isinstance(judge, str) else judge.name, made) for judge, made in zip(options.judge, judges, strict=True)]
    missing = [why for name in _sources(options, systems) if (why := why_not_at_hand(name))]
    count = options.expected_examples
    if not missing:
        prompts, _ = read_prompts(options, baseline, columns=any(judge.reads_columns for judge in judges))
        check_data(options, systems, prompts, judges)
        count = len(prompts)
    elif count is not None:
        count = min(count, options.max_prompts or count)
    pairs = 1 + (options.null and baseline.kind != "file") + (options.references and baseline.kind != "references")
    asked = None if count is None else count * pairs
    models = []
    if any(one.here for one in systems) and model is None:
        models = [model_weights(options.proposal, options.expected_proposal, options.dtype)]
        dtype = options.aligner_dtype or options.dtype
        models += [aligner_weights(name, options.expected_aligner, dtype) for name in options.aligner]
    return {
        "dry_run": True,
        "out": options.out,
        "data": {"at_hand": not missing, "why_not": missing[0] if missing else None, "prompts": count},
        "systems": {"baseline": options.baseline, "system": options.system},
        "judges": [name for name, _ in named],
        "most_questions": {
            name: None if asked is None else asked * judge.questions for name, judge in named if judge.questions
        },
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
