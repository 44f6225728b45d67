"""What `trimtab eval` refuses: first what the flags alone tell, then what the data tell, all before a model is loaded."""

import dataclasses
from collections.abc import Sequence

from trimtab.core.rules import Rule, parse_rule
from trimtab.data.prompts import show_prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.endpoints.sendable import check_sendable
from trimtab.errors import DataError, InvalidOption
from trimtab.evaluate.alpaca import Annotation
from trimtab.evaluate.length import LENGTH_CONTROLS, why_not_alpaca_eval
from trimtab.evaluate.options import EvalOptions
from trimtab.evaluate.systems import Prompts, System, answer_from_file
from trimtab.files import check_writable
from trimtab.judges.base import Judge

__all__ = ["check_data", "check_flags"]


def check_flags(options: EvalOptions, baseline: System, system: System, model: AlignedModel | None = None) -> None:
    """Refuse wrong flags, and flags that contradict each other.

    Args:
        options: the flags.
        baseline: against whom.
        system: whose win rate.
        model: the models, where they are loaded already.

    Raises:
        InvalidOption: naming the flag.
    """
    _check_systems(options, baseline, system, model)
    check_writable(options.out or "", folder=True)
    given = {field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default}
    if options.n != 1:
        raise InvalidOption("--n must be 1: one answer to a prompt is judged")
    if options.length_control not in LENGTH_CONTROLS:
        raise InvalidOption(f"--length_control must be one of {', '.join(LENGTH_CONTROLS)}, not '{options.length_control}'")
    _check_sweep(options, system, given, len(options.aligner if model is None else model.aligners))


def check_data(
    options: EvalOptions, systems: Sequence[System], prompts: Prompts, judges: Sequence[Judge], *, reported: bool = True
) -> None:
    """Refuse prompts that some system or judge could not take, and outputs that do not answer them.

    Args:
        options: the flags.
        systems: baseline and system.
        prompts: what they are asked.
        judges: who judges; none of them need be loaded.
        reported: whether these are the prompts to report on, rather than those of a sweep.

    Raises:
        DataError, InvalidOption: naming the place in the data.
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
        judge.check(prompts, where)
    names = [answer_from_file(one, prompts)[2] if one.kind == "file" else one.name for one in systems]
    if options.length_control == "alpaca_eval" and reported:
        annotations = [Annotation(None, "", "", generator_1=names[0])] * len(prompts)
        if why := why_not_alpaca_eval(annotations):
            raise InvalidOption(f"--length_control alpaca_eval: {why}")


def _check_systems(options: EvalOptions, baseline: System, system: System, model: AlignedModel | None) -> None:
    if options.dataset is None and baseline.kind != "file":
        raise InvalidOption("--dataset is required, unless --baseline is a file of outputs")
    here = [one for one in (baseline, system) if one.here]
    if here and not options.proposal and model is None:
        raise InvalidOption("--proposal is required for the systems proposal and aligned")
    if "aligned" in (baseline.kind, system.kind) and not (options.aligner if model is None else model.aligners):
        raise InvalidOption("--aligner is required for the system aligned")
    if any(one.rewritten for one in (baseline, system)) and options.rewriter is None:
        raise InvalidOption("--rewriter is required for a system rewritten:S")
    if baseline == system:
        raise InvalidOption(f"--system and --baseline are both {options.system}: --null compares a system with itself")


def _check_sweep(options: EvalOptions, system: System, given: set[str], aligners: int) -> None:
    if not options.sweep_weight:
        return
    for name, instead in (("weight", "sweep_weight"), ("rule", "sweep_rule"), ("dev_fraction", "dev_dataset")):
        if name in given and instead in given:
            raise InvalidOption(f"--{name} and --{instead} contradict each other")
    if system.kind != "aligned" or system.rewritten or aligners != 1:
        raise InvalidOption("--sweep_weight needs --system aligned with one --aligner")
    if not options.judge:
        raise InvalidOption("--sweep_weight needs a --judge to pick by")
    for text in options.sweep_rule:
        try:
            rule = parse_rule(text)
        except InvalidOption as error:
            raise InvalidOption(f"--sweep_rule: {str(error).removeprefix('rule: ')}") from error
        if not rule.has_row:
            raise InvalidOption(f"--sweep_rule: '{rule}' has no row in closed form, so its KL cannot be measured")
        _check_swept(options, rule)
    if not options.sweep_rule and options.rule is not None:
        _check_swept(options, parse_rule(options.rule))


def _check_swept(options: EvalOptions, rule: Rule) -> None:
    for weight in options.sweep_weight:
        try:
            rule.check_weights([weight])
        except InvalidOption as error:
            raise InvalidOption(f"--sweep_weight: {error}") from error
