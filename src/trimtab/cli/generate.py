"""`trimtab generate`: aligned text for prompts on the command line or in a file."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from trimtab.data.options import TemplateOptions, check_chats
from trimtab.decode.options import (
    DRAFTER_NAMES,
    ModelOptions,
    SamplingOptions,
    check_prompts,
    kernels_of,
    load_aligned_model,
    make_sampling_params,
)
from trimtab.errors import InvalidOption
from trimtab.files import json_digest, refuse_overwriting
from trimtab.jsonlines import ResumableLines, kept_header
from trimtab.options import option

__all__ = ["Options", "render", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options(SamplingOptions, TemplateOptions, ModelOptions):
    """Flags of `trimtab generate`."""

    prompt: tuple[str, ...] = option((), "a prompt; may repeat")
    input: str | None = option(None, "a data set whose 'prompt' (or 'messages') to complete", metavar="FILE")
    out: str | None = option(None, "write JSON Lines here, resuming an interrupted run", metavar="FILE")

    def idle(self) -> dict[str, str]:
        """What is for chats where there is none."""
        return dict.fromkeys(("chat_template_path", "date"), "is for chats, and --prompt is a text") if self.prompt else {}


def run(options: Options) -> dict[str, Any]:
    """Complete every prompt."""
    from trimtab.data.template import refuse_idle_date

    if bool(options.prompt) == bool(options.input):
        raise InvalidOption("give either --prompt or --input")
    params = make_sampling_params(options)
    prompts: list[Any] = list(options.prompt)
    records: list[Any] = []
    if options.out:
        refuse_overwriting(options.out, options.input)
    if options.input:
        from trimtab.data.records import read_records

        records = read_records(options.input, need="prompt", answers=False)
        prompts = [record.prompt for record in records]
        check_chats(options, prompts)
    model = load_aligned_model(options, options, kept_header(options.out).get("date") if options.out else None)
    refuse_idle_date(options.date, model.tokenizer)
    check_prompts(model, records, params)
    shaping = model.shaping(params)
    report: dict[str, Any] = {"rule": str(shaping.rule), "weight": list(shaping.weights)}
    report |= {} if shaping.blend is None else {"blend": list(shaping.blend)}
    report["kernels"] = kernels_of(model)
    if options.out is None:
        rows = _rows(prompts, model.generate(prompts, params), params.n)
        return report | {"completions": rows, "failed": sum("error" in row for row in rows)}
    return report | {"out": options.out} | _write(options, model, prompts, params)


def render(report: dict[str, Any]) -> str:
    """The texts, or where they went."""
    if "out" in report:
        failed = f", of which {report['failed']} ended in an error" if report["failed"] else ""
        return f"{report['rows']} completions in {report['out']}{failed}"
    return "\n\n".join(row["completion"] for row in report["completions"])


def _write(options: Options, model: Any, prompts: list[Any], params: Any) -> dict[str, Any]:
    from trimtab.decode.drafters import DRAFTERS
    from trimtab.models.fingerprint import fingerprint_of

    assert options.out is not None
    settings = {key: value for key, value in dataclasses.asdict(options).items() if key not in ("out", "input", "prompt")}
    weights = [fingerprint_of(m) for m in model.models.all]
    if (options.draft or "").partition(":")[0] in set(DRAFTERS) - set(DRAFTER_NAMES):
        settings["draft"] = model.drafter  # another package's: what it drafts from, and not where that was named
    settings |= {**model.encoder.chat_settings, "prompts": json_digest(prompts), "weights": weights}
    lines = ResumableLines(options.out, settings, params.n)
    with lines:
        for start in range(lines.done, len(prompts), options.max_num_seqs):
            part = prompts[start : start + options.max_num_seqs]
            lines.write(_rows(part, model.generate(part, params), params.n))
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
        rows.append(row if c.error is None else row | {"error": c.error})
    return rows
