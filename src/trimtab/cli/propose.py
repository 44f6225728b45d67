"""`trimtab propose`: samples from the proposal for every prompt of a data set."""

from dataclasses import dataclass
from typing import Any

from trimtab.cli.common import (
    DataOptions,
    ModelOptions,
    SamplingOptions,
    check_prompts,
    load_aligned_model,
    make_sampling_params,
    refuse_overwriting,
)
from trimtab.cli.dry_run import DryRunOptions, check_expected, describe_model, in_bytes, model_weights
from trimtab.cli.options import UsageError, option

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options(DryRunOptions, DataOptions, SamplingOptions):
    """Flags of `trimtab propose`."""

    proposal: str = option(
        "",
        "the model to sample from: a folder or a hub id (required without --endpoint); with --endpoint, its name there"
        " [default: the first that is served]",
        metavar="P",
    )
    dataset: str = option("", "data with a 'prompt' or 'messages'", required=True, metavar="D")
    max_examples: int | None = option(None, "take only the first so many records [default: all]")
    seed: int = option(0, "of the first prompt; each further one adds to it [default: 0]")
    out: str = option("", "the data set to write; an interrupted run goes on", required=True, metavar="FILE")
    dtype: str | None = option(None, "auto, float32, bfloat16 or float16 [default: auto]")
    device: str | None = option(None, "cpu, cuda, cuda:1, or auto to spread [default: the first GPU, or the CPU]")
    max_num_seqs: int | None = option(None, "most completions drawn at once [default: 32]")
    endpoint: tuple[str, ...] = option(
        (), "an OpenAI-compatible server to sample from instead, such as http://localhost:8000/v1; may repeat", metavar="URL"
    )
    concurrency: int | None = option(None, "most requests in flight for each --endpoint [default: 16]")
    request_timeout: float | None = option(None, "seconds that one request may take [default: 600]")
    max_retries: int | None = option(None, "tries after the first, of a request or for an endpoint in a row [default: 6]")


def run(options: Options) -> dict[str, Any]:
    """Sample and write."""
    from trimtab.endpoints.settings import make_limits
    from trimtab.train.records import read_records

    if not options.proposal and not options.endpoint:
        raise UsageError("--proposal is required")
    limits = make_limits(
        "endpoint",
        options.endpoint,
        {name: getattr(options, name) for name in ("dtype", "device", "max_num_seqs")},
        {name: getattr(options, name) for name in ("concurrency", "request_timeout", "max_retries")},
    )
    params = make_sampling_params(options, seed=options.seed)
    refuse_overwriting(options.out, options.dataset)
    check_expected(options)
    if options.dry_run:
        return _rehearse(options)
    records = read_records(options.dataset, need="prompt", how=options, limit=options.max_examples)
    rows = _remotely(options, limits, records, params) if options.endpoint else _here(options, records, params)
    return {"out": options.out, "rows": rows, "seed": params.seed}


def _here(options: Options, records: Any, params: Any) -> int:
    from trimtab.train.propose import propose

    most = 32 if options.max_num_seqs is None else options.max_num_seqs
    asked = ModelOptions(options.proposal, dtype=options.dtype or "auto", device=options.device, max_num_seqs=most)
    model = load_aligned_model(asked)
    check_prompts(model, records, params)
    return propose(model, records, options.out, params, batch_size=max(1, most // params.n))


def _remotely(options: Options, limits: Any, records: Any, params: Any) -> int:
    from trimtab.endpoints.client import Endpoints
    from trimtab.train.propose_remotely import propose_remotely

    with Endpoints(options.endpoint, limits) as endpoints:
        return propose_remotely(endpoints, options.proposal or None, records, options.out, params)


def _rehearse(options: Options) -> dict[str, Any]:
    """What would be asked, of whom, and for how much."""
    from trimtab.train.dry_run import count_records

    data = count_records(options.dataset, options, options.max_examples, options.expected_examples)
    records = data["examples"]
    report: dict[str, Any] = {"dry_run": True, "out": options.out, "data": data, "endpoints": list(options.endpoint)}
    report |= {"rows": None if records is None else records * options.n}
    report["most_tokens"] = None if records is None else records * options.n * options.max_tokens
    if not options.endpoint:
        report["proposal"] = model_weights(options.proposal, options.expected_proposal, options.dtype or "auto")
    return report


def _render_rehearsal(report: dict[str, Any]) -> str:
    data = report["data"]
    there = "at hand" if data["at_hand"] else f"not at hand: {data['why_not']}"
    lines = [f"data      {there}"]
    rows = "a number of samples that is not known" if report["rows"] is None else f"{report['rows']:,} samples"
    tokens = "" if report["most_tokens"] is None else f", at most {report['most_tokens']:,} tokens"
    lines.append(f"would write {rows}{tokens}, to {report['out']}")
    if "proposal" in report:
        model = report["proposal"]
        lines.append(f"proposal  {describe_model(model)}")
        lines.append(f"          {model['parameters']:,} parameters, {in_bytes(model['weights'])} in {model['dtype']}")
    else:
        lines.append(f"would ask {', '.join(report['endpoints'])}")
    return "\n".join(lines)


def render(report: dict[str, Any]) -> str:
    """Where the samples are."""
    if "dry_run" in report:
        return _render_rehearsal(report)
    return f"{report['rows']} samples in {report['out']}"
