"""What `trimtab eval` refuses: first what the flags alone tell, then what the data tell, all before a model is loaded."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.common import ModelOptions, SamplingOptions, check_writable
from trimtab.cli.options import UsageError
from trimtab.core.rules import parse_rule
from trimtab.endpoints.completions import check_sendable
from trimtab.endpoints.settings import base_url
from trimtab.errors import DataError, InvalidOption
from trimtab.evaluate.alpaca import Annotation
from trimtab.evaluate.judging import Judge
from trimtab.evaluate.length import LENGTH_CONTROLS, why_not_alpaca_eval
from trimtab.evaluate.references import METRICS
from trimtab.evaluate.scoring_judge import ReferenceJudge
from trimtab.evaluate.systems import Prompts, System, answer_from_file, show_prompt

if TYPE_CHECKING:
    from trimtab.cli.eval import Options

__all__ = ["check_data", "check_flags", "idle_options", "is_url"]

FOR_ANNOTATIONS = ("annotations", "length_control", "seed")
FOR_JUDGING = ("criterion", "orders", "judge_max_tokens", "prompt_price", "completion_price", "max_cost")
FOR_ENDPOINTS = ("concurrency", "request_timeout", "max_retries")
FOR_SWEEPS = ("sweep_rule", "max_kl", "dev_dataset", "dev_fraction")
FOR_REWARDS = ("dtype", "device")
FOR_DRAFTING = ("draft", "draft_temperature", "num_speculative_tokens")
FOR_WRITING = tuple(field.name for field in dataclasses.fields(SamplingOptions) if field.name != "seed")
"""All but the seed, which intervals and orders are drawn with, too."""
FOR_LAYOUTS = ("columns", "dataset_split", "dataset_config", "dataset_data_dir")


def idle_options(options: "Options") -> dict[str, str]:
    """The options that have no effect beside the others, and why."""
    if options.annotations is not None:
        others = [field.name for field in dataclasses.fields(options) if field.name not in FOR_ANNOTATIONS]
        return dict.fromkeys(others, "has no meaning with --annotations")
    systems = (options.baseline, options.system)
    given = [not is_url(name) and name not in ("proposal", "aligned") for name in systems]
    idle: dict[str, str] = {}

    def add(names: Sequence[str], why: str, *, where: bool) -> None:
        idle.update(dict.fromkeys(names, why) if where else {})

    add(FOR_LAYOUTS, "needs a --dataset in a TRL layout", where=not _has_layout(options))
    add(FOR_DRAFTING, "is for the system aligned, and neither --system nor --baseline is", where="aligned" not in systems)
    add(FOR_WRITING, "is for answers that are written now, and those of --system and --baseline are given", where=all(given))
    if not {"proposal", "aligned"} & {*systems}:
        scored = any(not is_url(judge) and judge not in METRICS for judge in options.judge)
        names = [field.name for field in dataclasses.fields(ModelOptions) if not (scored and field.name in FOR_REWARDS)]
        add(names, "is given, but neither --system nor --baseline is proposal or aligned", where=True)
        add(["leave_out_long"], "goes by the context of a model that runs here, and none does", where=True)
        add(["chat_template_path"], "is for chats with a model that runs here, and none does", where=True)
        add(["date"], "is for chats with a model that runs here, and none does", where=not scored)
    add(["null"], "needs a --judge, and a --baseline that can answer again", where=given[0] or not options.judge)
    add(["references"], "needs systems that are not the references themselves", where="references" in systems)
    add(FOR_JUDGING, "needs a --judge that is an endpoint", where=not any(map(is_url, options.judge)))
    add(FOR_ENDPOINTS, "needs an endpoint, as a system or a judge", where=not any(map(is_url, (*systems, *options.judge))))
    rouge = any(spec.startswith("rouge") for spec in options.judge if spec in METRICS)
    add(["rouge_tokenizer"], "needs a --judge that is rouge1, rouge2, rougeL or rougeLsum", where=not rouge)
    add(FOR_SWEEPS, "needs --sweep_weight", where=not options.sweep_weight)
    return idle


def _has_layout(options: "Options") -> bool:
    named = [name for name in (options.dataset, options.dev_dataset) if name]
    return any(not name.endswith((".json", ".json.gz")) for name in named)


def check_flags(options: "Options", baseline: System, system: System) -> None:
    """Refuse wrong flags, and flags that contradict each other.

    Raises:
        UsageError, InvalidOption: naming the flag.
    """
    _check_systems(options, baseline, system)
    check_writable(options.out or "", folder=True)
    given = {field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default}
    if options.n != 1:
        raise UsageError("--n must be 1: one answer to a prompt is judged")
    if options.max_prompts is not None and options.max_prompts < 1:
        raise UsageError(f"--max_prompts must be at least 1, not {options.max_prompts}")
    if options.length_control not in LENGTH_CONTROLS:
        raise UsageError(f"--length_control must be one of {', '.join(LENGTH_CONTROLS)}, not '{options.length_control}'")
    for spec in options.judge:
        _check_judge(spec)
    _check_sweep(options, system, given)


def check_data(
    options: "Options", systems: Sequence[System], prompts: Prompts, judges: Sequence[Judge], *, reported: bool = True
) -> None:
    """Refuse prompts that some system or judge could not take, and outputs that do not answer them.

    Args:
        options: the flags.
        systems: baseline and system.
        prompts: what they are asked.
        judges: those that need not be loaded.
        reported: whether these are the prompts to report on, rather than those of a sweep.

    Raises:
        DataError, UsageError: naming the place in the data.
    """
    where = options.dataset or options.baseline
    for prompt, source in zip(prompts.prompts, prompts.sources, strict=True):
        if not show_prompt(prompt).strip():
            raise DataError(f"{source}: the prompt is empty")
    check_sendable(prompts.prompts, prompts.sources)
    check_sendable([text or "" for text in prompts.references], prompts.sources, "wanted answer")
    if "references" in (one.kind for one in systems) and not all(prompts.references):
        raise DataError(f"{where}: not every prompt has a wanted answer, as the system references needs")
    for judge in judges:
        if isinstance(judge, ReferenceJudge):
            _check_references(judge, prompts, where)
    names = [answer_from_file(one, prompts)[2] if one.kind == "file" else one.name for one in systems]
    if options.length_control == "alpaca_eval" and reported:
        annotations = [Annotation(None, "", "", generator_1=names[0])] * len(prompts)
        if why := why_not_alpaca_eval(annotations):
            raise UsageError(f"--length_control alpaca_eval: {why}")


def is_url(text: str) -> bool:
    """Whether a judge or a system is an endpoint."""
    return text.startswith(("http://", "https://"))


def _check_systems(options: "Options", baseline: System, system: System) -> None:
    if options.dataset is None and baseline.kind != "file":
        raise UsageError("--dataset is required, unless --baseline is a file of outputs")
    here = [one for one in (baseline, system) if one.here]
    if here and not options.proposal:
        raise UsageError("--proposal is required for the systems proposal and aligned")
    if "aligned" in (baseline.kind, system.kind) and not options.aligner:
        raise UsageError("--aligner is required for the system aligned")
    if baseline == system:
        raise UsageError(f"--system and --baseline are both {options.system}: --null compares a system with itself")


def _check_judge(spec: str) -> None:
    if is_url(spec):
        base_url(spec.partition("#")[0])
    elif spec not in METRICS and not Path(spec).is_dir() and ("/" not in spec or Path(spec).is_absolute()):
        raise UsageError(
            f"--judge '{spec}' is none: give URL#MODEL, a reward model's folder or hub id, or one of {', '.join(METRICS)}"
        )


def _check_sweep(options: "Options", system: System, given: set[str]) -> None:
    if not options.sweep_weight:
        return
    for name, instead in (("weight", "sweep_weight"), ("rule", "sweep_rule"), ("dev_fraction", "dev_dataset")):
        if name in given and instead in given:
            raise UsageError(f"--{name} and --{instead} contradict each other")
    if system.kind != "aligned" or len(options.aligner) != 1:
        raise UsageError("--sweep_weight needs --system aligned with one --aligner")
    if not options.judge:
        raise UsageError("--sweep_weight needs a --judge to pick by")
    if not 0 < options.dev_fraction < 1:
        raise UsageError(f"--dev_fraction must be between 0 and 1, not {options.dev_fraction}")
    if options.max_kl is not None and not options.max_kl >= 0:
        raise UsageError(f"--max_kl must be at least 0, not {options.max_kl}")
    for text in options.sweep_rule:
        try:
            rule = parse_rule(text)
        except InvalidOption as error:
            raise UsageError(f"--sweep_rule: {str(error).removeprefix('rule: ')}") from error
        if not rule.has_row:
            raise UsageError(f"--sweep_rule: '{rule}' has no row in closed form, so its KL cannot be measured")


def _check_references(judge: ReferenceJudge, prompts: Prompts, where: str) -> None:
    known: list[Any] = [one for one in zip(prompts.references, prompts.sources, strict=True) if (one[0] or "").strip()]
    if not known:
        raise DataError(f"{where}: has no wanted answers, which --judge {judge.name} compares with")
    for text, source in known if judge.metric.tokenizer == "ascii" else ():
        try:
            judge.metric.score([""], [text])
        except InvalidOption as error:
            raise UsageError(f"{source}: {error}: --rouge_tokenizer") from error
