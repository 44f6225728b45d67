"""`trimtab propose`: samples for every prompt of a data set, or preference pairs of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.data.options import DataOptions, LengthOptions, TemplateOptions, check_chats
from trimtab.decode.options import (
    ModelOptions,
    SamplingOptions,
    check_prompts,
    load_aligned_model,
    make_sampling_params,
    places_that_fit,
)
from trimtab.errors import InvalidOption
from trimtab.files import refuse_overwriting
from trimtab.jsonlines import kept_header
from trimtab.models.estimates import (
    DryRunOptions,
    aligner_weights,
    describe_model,
    describe_size,
    model_weights,
)
from trimtab.options import option, same

if TYPE_CHECKING:
    from trimtab.propose.local import Written

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options(DryRunOptions, DataOptions, LengthOptions, TemplateOptions, SamplingOptions):
    """Flags of `trimtab propose`."""

    proposal: str = option(
        "",
        "the model to sample from: a folder or a hub id (required without --endpoint); with --endpoint, its name there"
        " [default: the first that is served]",
        metavar="P",
    )
    aligner: tuple[str, ...] = option(
        (),
        "sample from the proposal with this aligner, as its manifest says; may repeat [default: the bare proposal]",
        metavar="A",
    )
    reward_model: str | None = option(
        None,
        "write pairs: of the --n samples of a prompt the best against the worst by this sequence classifier, a folder or a hub"
        " id [default: every sample is written]",
        metavar="RM",
    )
    pairs: int | None = option(None, "pairs of each prompt for --reward_model, at most half of --n [default: 1]")
    dataset: str = option("", "data with a 'prompt' or 'messages'", required=True, metavar="D")
    max_examples: int | None = option(None, "take only the first so many records [default: all]", low=1)
    seed: int = same(SamplingOptions, "seed", default=0, help="of the first prompt; each further one adds to it [default: 0]")
    out: str = option("", "the data set to write; an interrupted run goes on", required=True, metavar="FILE")
    dtype: str | None = option(None, "auto, float32, bfloat16 or float16 [default: auto]")
    device: str | None = option(None, "cpu, cuda, cuda:1, or auto to spread [default: the first GPU, or the CPU]")
    backend: str | None = option(None, "who runs GGUF files [default: torch, in float32]", choices=("llamacpp",))
    max_num_seqs: int | None = option(None, "most completions drawn at once [default: 32]", low=1)
    endpoint: tuple[str, ...] = option(
        (), "an OpenAI-compatible server to sample from instead, such as http://localhost:8000/v1; may repeat", metavar="URL"
    )
    concurrency: int | None = option(None, "most requests in flight for each --endpoint [default: 16]")
    request_timeout: float | None = option(None, "seconds that one request may take [default: 600]")
    max_retries: int | None = option(None, "tries after the first, of a request or for an endpoint in a row [default: 6]")

    def idle(self) -> dict[str, str]:
        """What takes other models than are named."""
        idle = {} if self.reward_model else {"pairs": "needs --reward_model"}
        everywhere = () if self.reward_model else ("dtype", "device", "date")
        local = ("aligner", "backend", "max_num_seqs", "leave_out_long", "chat_template_path", *everywhere)
        remote = ("concurrency", "request_timeout", "max_retries")
        here = dict.fromkeys(local, "is for a model that runs here, not for --endpoint")
        return idle | (here if self.endpoint else dict.fromkeys(remote, "needs --endpoint"))


def run(options: Options) -> dict[str, Any]:
    """Sample and write."""
    from trimtab.data.records import read_records
    from trimtab.endpoints.settings import make_limits

    if not options.proposal and not options.endpoint:
        raise InvalidOption("--proposal is required")
    limits = make_limits(
        "endpoint",
        options.endpoint,
        {},
        {name: getattr(options, name) for name in ("concurrency", "request_timeout", "max_retries")},
    )
    params = make_sampling_params(options, seed=options.seed)
    refuse_overwriting(options.out, options.dataset)
    pairs = _pairs(options)
    if options.dry_run:
        return _rehearse(options, pairs)
    records = read_records(options.dataset, need="prompt", how=options, limit=options.max_examples, answers=not pairs)
    check_chats(options, [record.prompt for record in records])
    date = _date(options)
    ranking = _ranking(options, pairs, records, date)
    if options.endpoint:
        written = _remotely(options, limits, records, params, ranking)
    else:
        written = _here(options, records, params, ranking, date)
    return {"out": options.out, **written._asdict(), "pairs": pairs, "seed": params.seed}


def _pairs(options: Options) -> int:
    """Pairs of each prompt; 0 where samples are written as they are."""
    if options.reward_model is None:
        return 0
    pairs = 1 if options.pairs is None else options.pairs
    if options.temperature == 0:
        raise InvalidOption("--reward_model needs samples that differ: --temperature must be above 0")
    if not 1 <= pairs <= options.n // 2:
        raise InvalidOption(f"--pairs must be from 1 to half of --n, which is {options.n}, not {pairs}")
    return pairs


def _date(options: Options) -> str:
    """What chat templates take for today: as the run has it that is resumed."""
    from trimtab.data.template import pick_date

    kept = kept_header(options.out)
    who = kept.get("proposal")
    return pick_date(options.date, kept.get("date") or (who.get("date") if isinstance(who, dict) else None))


def _ranking(options: Options, pairs: int, records: Any, date: str) -> Any:
    """How samples become pairs, if they do."""
    from trimtab.data.template import refuse_idle_date
    from trimtab.judges.reward import load_reward_model
    from trimtab.propose.ranking import Ranking

    if options.reward_model is None:
        return None
    prompts, sources = [record.prompt for record in records], [record.source for record in records]
    local = options.dtype or "auto", options.device
    model = load_reward_model("--reward_model", options.reward_model, prompts, sources, *local, date)
    if options.endpoint:
        refuse_idle_date(options.date, model.tokenizer)
    settings = model.chat_settings
    name = " ".join([model.fingerprint, *(str(value) for value in settings.values() if value is not None)])
    return Ranking(model, name, pairs, settings.get("date"))


def _here(options: Options, records: Any, params: Any, ranking: Any, date: str) -> "Written":
    from trimtab.data.template import refuse_idle_date
    from trimtab.propose.local import propose

    most = 32 if options.max_num_seqs is None else options.max_num_seqs
    asked = ModelOptions(
        options.proposal,
        options.aligner,
        dtype=options.dtype or "auto",
        device=options.device,
        backend=options.backend,
        max_num_seqs=most,
    )
    model = load_aligned_model(asked, options, date)
    refuse_idle_date(options.date, model.tokenizer, *([ranking.scorer.tokenizer] if ranking is not None else []))
    prompts, sources = [record.prompt for record in records], [record.source for record in records]
    records = [records[i] for i in places_that_fit(options, model, prompts, [None] * len(records), sources)]
    check_prompts(model, records, params)
    return propose(model, records, options.out, params, max(1, most // params.n), ranking)


def _remotely(options: Options, limits: Any, records: Any, params: Any, ranking: Any) -> "Written":
    from trimtab.endpoints.client import Endpoints
    from trimtab.propose.remote import propose_remotely

    with Endpoints(options.endpoint, limits) as endpoints:
        return propose_remotely(endpoints, options.proposal or None, records, options.out, params, ranking)


def _rehearse(options: Options, pairs: int) -> dict[str, Any]:
    """What would be asked, of whom, and for how much."""
    from trimtab.data.at_hand import count_records
    from trimtab.models.shapes import is_here

    data = count_records(options.dataset, options, options.max_examples, options.expected_examples, answers=not pairs)
    records = data["examples"]
    report: dict[str, Any] = {"dry_run": True, "out": options.out, "data": data, "endpoints": list(options.endpoint)}
    report |= {"rows": None if records is None else records * (pairs or options.n)}
    report |= {"pairs": pairs, "reward_model": None}
    if model := options.reward_model:
        report["reward_model"] = {"name": model, "at_hand": is_here(model)}
    report["most_tokens"] = None if records is None else records * options.n * options.max_tokens
    if not options.endpoint:
        dtype = options.dtype or "auto"
        report["proposal"] = model_weights(options.proposal, options.expected_proposal, dtype)
        report["aligners"] = [aligner_weights(a, None, dtype) if is_here(a) else {"name": a} for a in options.aligner]
    return report


def _render_rehearsal(report: dict[str, Any]) -> str:
    data = report["data"]
    there = "at hand" if data["at_hand"] else f"not at hand: {data['why_not']}"
    lines = [f"data      {there}"]
    what = "pairs" if report["pairs"] else "samples"
    rows = f"a number of {what} that is not known" if report["rows"] is None else f"{report['rows']:,} {what}"
    tokens = "" if report["most_tokens"] is None else f", at most {report['most_tokens']:,} tokens"
    lines.append(f"would write {rows}{tokens}, to {report['out']}")
    if "proposal" in report:
        for kind, model in [("proposal", report["proposal"]), *(("aligner ", found) for found in report["aligners"])]:
            if "weights" in model:
                lines += [f"{kind}  {describe_model(model)}", f"          {describe_size(model)}"]
            else:
                lines.append(f"{kind}  {model['name']}, which is not at hand")
    else:
        lines.append(f"would ask {', '.join(report['endpoints'])}")
    if model := report["reward_model"]:
        lines.append(f"ranked by {model['name']}" + ("" if model["at_hand"] else ", which is not at hand"))
    return "\n".join(lines)


def render(report: dict[str, Any]) -> str:
    """Where the samples are."""
    if "dry_run" in report:
        return _render_rehearsal(report)
    failed = f", of which {report['failed']} could not be finished" if report["failed"] else ""
    return f"{report['rows']} {'pairs' if report['pairs'] else 'samples'} in {report['out']}{failed}"
