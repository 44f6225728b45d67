"""`trimtab generate`: aligned text for prompts on the command line or in a file."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from trimtab.data.options import TemplateOptions, check_chats
from trimtab.decode.options import (
    ModelOptions,
    SamplingOptions,
    check_prompts,
    facts_of,
    kernels_of,
    load_aligned_model,
    make_sampling_params,
)
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.files import json_digest, refuse_overwriting
from trimtab.handover.options import REMOTE, HandoverOptions, open_handover
from trimtab.jsonlines import ResumableLines, kept_header
from trimtab.options import option
from trimtab.rewriting.options import RewriterOptions, Rewriting, load_rewriter

__all__ = ["Options", "render", "run"]

logger = logging.getLogger(__name__)

OF_REWRITERS = tuple(field.name for field in dataclasses.fields(RewriterOptions))
LATER = ("sequence_level", "handover", "blend", "rule_weight", "leader", *OF_REWRITERS)
"""Options that came after files had been begun, which go on where these are not given."""


@dataclass(frozen=True)
class Options(SamplingOptions, RewriterOptions, HandoverOptions, TemplateOptions, ModelOptions):
    """Flags of `trimtab generate`."""

    prompt: tuple[str, ...] = option((), "a prompt; may repeat")
    input: str | None = option(None, "a data set whose 'prompt' (or 'messages') to complete", metavar="FILE")
    sequence_level: str | None = option(
        None,
        "draw whole sequences from the sequence-level law, and not token by token from the token-level one: 'particles=16', or"
        " 'particles=16,ess=0.5', which says when they are resampled",
        metavar="SETTINGS",
    )
    out: str | None = option(None, "write JSON Lines here, resuming an interrupted run", metavar="FILE")

    def idle(self) -> dict[str, str]:
        """What is for chats where there is none, and what drafts where nothing is drafted."""
        idle = dict.fromkeys(("chat_template_path", "date"), "is for chats, and --prompt is a text") if self.prompt else {}
        if self.sequence_level:
            why = "has no effect with --sequence_level: nobody drafts for particles"
            idle |= dict.fromkeys(("draft", "draft_temperature", "num_speculative_tokens"), why)
        if self.leader is not None:
            idle |= dict.fromkeys(("sequence_level", "blend"), "has no effect with --leader")
        elif not self.aligner:
            idle["sequence_level"] = "needs an --aligner: the proposal alone is the same at both levels"
        return idle


def run(options: Options) -> dict[str, Any]:
    """Complete every prompt."""
    from trimtab.data.template import pick_date, refuse_idle_date

    if bool(options.prompt) == bool(options.input):
        raise InvalidOption("give either --prompt or --input")
    params = make_sampling_params(options)
    how = _sequence_level(options, params)
    records: list[Any] = []
    if options.out:
        refuse_overwriting(options.out, options.input)
    if options.input:
        from trimtab.data.records import read_records

        records = read_records(options.input, need="prompt", answers=False)
    prompts: list[Any] = [record.prompt for record in records] or list(options.prompt)
    if options.input:
        check_chats(options, prompts)
    kept_date = kept_header(options.out).get("date") if options.out else None
    rewriting = None
    if options.rewriter is not None:  # first, so that what is wrong with it costs no other model's loading
        rewriting = Rewriting(load_rewriter(options, options, pick_date(options.date, kept_date)), options)
    if options.has_leader:
        with open_handover(options, kept_date) as opened:
            return _hand_over(options, opened, prompts, records, params, rewriting)
    asked = options if how is None else dataclasses.replace(options, draft="none")  # no drafter is loaded for particles
    model = load_aligned_model(asked, options, kept_date)
    refuse_idle_date(options.date, model.tokenizer)
    check_prompts(records, partial(model.prepare, params=params))
    shaping = model.shaping(params)
    report: dict[str, Any] = {"rule": str(shaping.rule), "weight": list(shaping.weights), "target": "token-level"}
    report |= {} if shaping.blend is None else {"blend": list(shaping.blend)}
    complete = model.generate
    if how is not None:
        _check_rule(shaping.rule)
        report |= {"target": "sequence-level", "sequence_level": str(how)}
        complete = partial(model.generate, sequence_level=how)
    report["kernels"] = kernels_of(model)
    return report | _answer(options, prompts, params, complete, partial(facts_of, options, model), rewriting)


def _hand_over(
    options: Options, opened: Any, prompts: list[Any], records: list[Any], params: Any, rewriting: Rewriting | None
) -> dict[str, Any]:
    """Complete every prompt, with a leader."""
    from trimtab.data.template import refuse_idle_date

    handover = opened.handover
    refuse_idle_date(options.date, *opened.tokenizers)
    check_prompts(records, partial(handover.check, params=params))
    report = {"leader": options.leader, "handover": str(handover.rule), "target": "text-level hand-over"}
    report |= {"kernels": opened.kernels}
    return report | _answer(options, prompts, params, handover.generate, lambda: opened.facts, rewriting)


def _answer(
    options: Options,
    prompts: list[Any],
    params: Any,
    complete: Callable[..., list[Any]],
    facts: Callable[[], dict[str, Any]],
    rewriting: Rewriting | None,
) -> dict[str, Any]:
    """The completions, or where they went; `facts` are those that decide them beside the options."""

    def rows_of(some: list[Any]) -> list[dict[str, Any]]:
        completions = complete(some, params)
        rows = _rows(some, completions, params.n)
        for place, new in ({} if rewriting is None else rewriting.rewrite(some, completions, params)).items():
            rows[place] |= {"completion": new.text, "rewritten_from": list(new.before), "finish_reason": new.finish_reason}
            rows[place] |= {} if new.completion is None else {"completion_tokens": len(new.completion.tokens)}
            rows[place] |= {} if new.error is None else {"error": new.error}
        return rows

    if options.out is None:
        rows = rows_of(prompts)
        return {"completions": rows, "failed": sum("error" in row for row in rows)}
    known = facts()
    if rewriting is not None:
        who = rewriting.rewriter
        known |= {"rewriter_weights": who.model.fingerprints, "rewriter_template": str(who.template)}
    return {"out": options.out} | _write(options, known, prompts, params, rows_of)


def render(report: dict[str, Any]) -> str:
    """The texts, or where they went."""
    if "out" in report:
        failed = f", of which {report['failed']} ended in an error" if report["failed"] else ""
        return f"{report['rows']} completions in {report['out']}{failed}"
    return "\n\n".join(row["completion"] for row in report["completions"])


def _sequence_level(options: Options, params: Any) -> Any:
    """How whole sequences are drawn, if they are, checked as far as it can be before the models are loaded."""
    from trimtab.core.rules import parse_rule
    from trimtab.decode.sequence_level import parse_sequence_level, refuse_knobs

    if options.sequence_level is None:
        return None
    try:
        how = parse_sequence_level(options.sequence_level)
        refuse_knobs(params)
    except InvalidRequest as error:
        raise InvalidOption(str(error)) from error
    if options.rule is not None:
        _check_rule(parse_rule(options.rule))
    return how


def _check_rule(rule: Any) -> None:
    from trimtab.decode.sequence_level import refuse_rule

    try:
        refuse_rule(rule)
    except InvalidRequest as error:
        raise InvalidOption(str(error)) from error


def _write(
    options: Options,
    facts: dict[str, Any],
    prompts: list[Any],
    params: Any,
    rows_of: Callable[[list[Any]], list[dict[str, Any]]],
) -> dict[str, Any]:
    assert options.out is not None
    apart = ("out", "input", "prompt", *REMOTE)
    settings = {key: value for key, value in dataclasses.asdict(options).items() if key not in apart}
    for name in LATER:
        if settings[name] is None:
            del settings[name]
    lines = ResumableLines(options.out, settings | facts | {"prompts": json_digest(prompts)}, params.n)
    with lines:
        for start in range(lines.done, len(prompts), options.max_num_seqs):
            part = prompts[start : start + options.max_num_seqs]
            lines.write(rows_of(part))
            logger.info("completed %d of %d prompts", start + len(part), len(prompts))
    return {"rows": len(prompts) * options.n, "failed": lines.failed}


def _rows(prompts: list[Any], completions: list[Any], n: int) -> list[dict[str, Any]]:
    """One row for each completion."""
    from trimtab.data.prompts import chat_columns

    rows = []
    for i, c in enumerate(completions):
        row = {
            **chat_columns(prompts[i // n]),
            "completion": c.text,
            "finish_reason": c.finish_reason,
            "seed": c.seed,
            "index": c.index,
        }
        row |= {"prompt_tokens": c.prompt_tokens, "completion_tokens": len(c.tokens)}
        row |= {} if c.fallbacks is None else {"fallbacks": c.fallbacks}
        row |= {} if c.handover_at is None else {"handover_at": c.handover_at}
        row |= {} if c.particles is None else {"sequence_level": _told(c.particles)}
        rows.append(row if c.error is None else row | {"error": c.error})
    return rows


def _told(particles: Any) -> dict[str, Any]:
    """What a row says of the run that its completion was drawn from."""
    return {
        "log_z": particles.log_z,
        "effective_size": particles.effective_size,
        "least_size": particles.least_size,
        "resamplings": len(particles.resampled),
        "origins": particles.origins,
        "collapsed": particles.collapsed,
    }
