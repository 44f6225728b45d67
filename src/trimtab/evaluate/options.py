"""What `trimtab eval` and `trimtab.evaluate` can be told."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.data.options import DataOptions, LengthOptions, TemplateOptions
from trimtab.decode.options import ModelOptions, SamplingOptions
from trimtab.endpoints.settings import Limits, is_url
from trimtab.errors import InvalidOption
from trimtab.judges.base import Judge
from trimtab.judges.kinds import judge_help, options_read
from trimtab.models.estimates import DryRunOptions
from trimtab.options import option, same
from trimtab.rewriting.options import RewriterOptions

__all__ = ["REWRITTEN", "EvalOptions"]

FOR_ANNOTATIONS = ("annotations", "length_control", "seed")
FOR_ENDPOINTS = ("concurrency", "request_timeout", "max_retries")
FOR_SWEEPS = ("sweep_rule", "max_kl", "dev_dataset", "dev_fraction")
FOR_DRAFTING = ("draft", "draft_temperature", "num_speculative_tokens")
FOR_WRITING = tuple(field.name for field in dataclasses.fields(SamplingOptions) if field.name != "seed")
"""All but the seed, which intervals and orders are drawn with, too."""
AN_ENDPOINT_JUDGE = "needs a --judge that is an endpoint"
AN_ENDPOINT = "needs an endpoint, as a system or a judge"
OF_REWRITERS = tuple(field.name for field in dataclasses.fields(RewriterOptions))
REWRITTEN = "rewritten:"
"""Before a system whose answers a rewriter rewrites."""
FOR_LAYOUTS = ("columns", "dataset_split", "dataset_config", "dataset_data_dir")


@dataclass(frozen=True)
class EvalOptions(DryRunOptions, DataOptions, LengthOptions, SamplingOptions, RewriterOptions, TemplateOptions, ModelOptions):
    """Options of `trimtab eval` and `trimtab.evaluate`.

    `needs` in the metadata of an option that judges read says what is missing where none of those that are asked for does.
    """

    annotations: str | None = option(
        None, "summarise this AlpacaEval annotation file, and do nothing else", metavar="FILE.json"
    )
    proposal: str = option("", "the frozen model: a folder or a hub id; for the systems proposal and aligned", metavar="P")
    dataset: str | None = option(
        None, "prompts, with wanted answers if there are any: a TRL layout, or AlpacaEval's JSON", metavar="D"
    )
    max_prompts: int | None = option(None, "take only the first so many prompts", low=1)
    apply_chat_template: bool = option(False, "ask a prompt that is a text as a user's message")
    system: str = option(
        "aligned",
        "whose win rate: proposal, aligned, references, URL#MODEL, a file of outputs, or rewritten: and one of them, for what"
        " --rewriter makes of its answers",
        metavar="S",
    )
    baseline: str = option("proposal", "against whom: the same", metavar="S")
    judge: tuple[str | Judge, ...] = option((), judge_help, metavar="J")
    criterion: str = option(
        "helpful", "what an endpoint judges: helpful, harmless or summary", metavar="NAME", needs=AN_ENDPOINT_JUDGE
    )
    orders: str = option(
        "both",
        "show an endpoint each pair in both orders, or once in a random one",
        choices=("both", "random"),
        needs=AN_ENDPOINT_JUDGE,
    )
    rouge_tokenizer: str | None = option(
        None,
        "ascii, as published, or unicode [default: ascii]",
        needs="needs a --judge that is rouge1, rouge2, rougeL or rougeLsum",
    )
    null: bool = option(True, "also judge the baseline against itself with another seed")
    references: bool = option(True, "also judge the data's own answers against the baseline")
    length_control: str = option("auto", "auto, alpaca_eval, or 'length-only fit'", metavar="HOW")
    judge_max_tokens: int = option(
        4, "room for an endpoint judge's answer; a model that thinks first needs hundreds", low=1, needs=AN_ENDPOINT_JUDGE
    )
    prompt_price: float | None = option(None, "of a million tokens that an endpoint judge reads", needs=AN_ENDPOINT_JUDGE)
    completion_price: float | None = option(None, "of a million tokens that it writes", needs=AN_ENDPOINT_JUDGE)
    max_cost: float | None = option(
        None, "the most to spend on each endpoint judge, earlier parts of the run included", needs=AN_ENDPOINT_JUDGE
    )
    concurrency: int = option(8, "most requests in flight for each endpoint", needs=AN_ENDPOINT)
    request_timeout: float = option(600.0, "seconds that one request may take", needs=AN_ENDPOINT)
    max_retries: int = option(6, "tries after the first, of a request or for an endpoint in a row", needs=AN_ENDPOINT)
    sweep_weight: tuple[float, ...] = option(
        (), "try this weight on development prompts, and go on with the one that wins most; may repeat"
    )
    sweep_rule: tuple[str, ...] = option((), "with this rule; may repeat [default: --rule]", metavar="RULE")
    max_kl: float | None = option(None, "nats per sequence that the pick of a sweep may be away from the proposal", low=0)
    dev_dataset: str | None = option(None, "development prompts of a sweep [default: a part of --dataset]", metavar="D")
    dev_fraction: float = option(0.2, "the part, drawn by prompt", above=0, below=1)
    seed: int = same(
        SamplingOptions,
        "seed",
        default=0,
        help="prompt i is answered with this seed + i; the same seed gives the same text, in float32 [default: 0]",
    )
    out: str | None = option(None, "the folder to write; a run that is started again goes on", metavar="DIR")
    max_tokens: int = same(SamplingOptions, "max_tokens", default=512, help="most tokens of an answer")
    expected_aligner: str | None = option(None, "for --dry_run: the same for every --aligner", metavar="A", kept=True)

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        Limits(self.concurrency, self.request_timeout, self.max_retries)
        for judge in self.judge:
            if not isinstance(judge, (str, Judge)):
                raise InvalidOption(f"--judge must be a text, or a trimtab.judges.base.Judge, not {judge!r}")

    def idle(self) -> dict[str, str]:
        """What is for other systems, other judges, a sweep, or no annotations."""
        return _idle_options(self)


def _idle_options(options: EvalOptions) -> dict[str, str]:
    """The options that have no effect beside the others, and why."""
    if options.annotations is not None:
        others = [field.name for field in dataclasses.fields(options) if field.name not in FOR_ANNOTATIONS]
        return dict.fromkeys(others, "has no meaning with --annotations")
    names_of_systems = (options.baseline, options.system)
    systems = tuple(name.removeprefix(REWRITTEN) for name in names_of_systems)
    rewritten = any(name.startswith(REWRITTEN) for name in names_of_systems)
    read = frozenset[str]().union(*map(options_read, options.judge), FOR_ENDPOINTS if any(map(is_url, systems)) else ())
    given = [not is_url(name) and name not in ("proposal", "aligned") for name in systems]
    idle: dict[str, str] = {}

    def add(names: Sequence[str], why: str, *, where: bool) -> None:
        idle.update(dict.fromkeys(names, why) if where else {})

    add(FOR_LAYOUTS, "needs a --dataset in a TRL layout", where=not _has_layout(options))
    add(FOR_DRAFTING, "is for the system aligned, and neither --system nor --baseline is", where="aligned" not in systems)
    add(
        FOR_WRITING,
        "is for answers that are written now, and those of --system and --baseline are given",
        where=all(given) and not rewritten,
    )
    add(OF_REWRITERS, "rewrites the answers of a --system or --baseline rewritten:S, and neither is", where=not rewritten)
    if not {"proposal", "aligned"} & {*systems} and not rewritten:
        names = [field.name for field in dataclasses.fields(ModelOptions) if field.name not in read]
        add(names, "is given, but neither --system nor --baseline is proposal or aligned", where=True)
        add(["leave_out_long"], "goes by the context of a model that runs here, and none does", where=True)
        add(["chat_template_path"], "is for chats with a model that runs here, and none does", where=True)
        add(["date"], "is for chats with a model that runs here, and none does", where="date" not in read)
    add(["null"], "needs a --judge, and a --baseline that can answer again", where=given[0] or not options.judge)
    add(["references"], "needs systems that are not the references themselves", where="references" in systems)
    for field in dataclasses.fields(options):
        if (needs := field.metadata.get("needs")) is not None:
            add([field.name], needs, where=field.name not in read)
    add(FOR_SWEEPS, "needs --sweep_weight", where=not options.sweep_weight)
    return idle


def _has_layout(options: EvalOptions) -> bool:
    named = [name for name in (options.dataset, options.dev_dataset) if name]
    return any(not name.endswith((".json", ".json.gz")) for name in named)
