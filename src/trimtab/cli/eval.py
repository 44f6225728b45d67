"""`trimtab eval`: is the aligned model better, by how much, for which prompts, how far has it moved, and what does it cost?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.cli.common import DataOptions, LengthOptions, ModelOptions, SamplingOptions, TemplateOptions
from trimtab.cli.dry_run import DryRunOptions
from trimtab.cli.options import UsageError, option
from trimtab.endpoints.settings import Limits

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options(DryRunOptions, DataOptions, LengthOptions, SamplingOptions, TemplateOptions, ModelOptions):
    """Flags of `trimtab eval`."""

    annotations: str | None = option(
        None, "summarise this AlpacaEval annotation file, and do nothing else", metavar="FILE.json"
    )
    proposal: str = option("", "the frozen model: a folder or a hub id; for the systems proposal and aligned", metavar="P")
    dataset: str | None = option(
        None, "prompts, with wanted answers if there are any: a TRL layout, or AlpacaEval's JSON", metavar="D"
    )
    max_prompts: int | None = option(None, "take only the first so many prompts")
    apply_chat_template: bool = option(False, "ask a prompt that is a text as a user's message")
    system: str = option(
        "aligned", "whose win rate: proposal, aligned, references, URL#MODEL, or a file of outputs", metavar="S"
    )
    baseline: str = option("proposal", "against whom: the same", metavar="S")
    judge: tuple[str, ...] = option(
        (),
        "URL#MODEL of an OpenAI-compatible endpoint, a reward model's folder or hub id, or rouge1, rouge2, rougeL, rougeLsum,"
        " chrf; may repeat",
        metavar="J",
    )
    criterion: str = option("helpful", "what an endpoint judges: helpful, harmless or summary", metavar="NAME")
    orders: str = option(
        "both", "show an endpoint each pair in both orders, or once in a random one", choices=("both", "random")
    )
    rouge_tokenizer: str | None = option(None, "ascii, as published, or unicode [default: ascii]")
    null: bool = option(True, "also judge the baseline against itself with another seed")
    references: bool = option(True, "also judge the data's own answers against the baseline")
    length_control: str = option("auto", "auto, alpaca_eval, or 'length-only fit'", metavar="HOW")
    judge_max_tokens: int = option(4, "room for an endpoint judge's answer; a model that thinks first needs hundreds")
    prompt_price: float | None = option(None, "of a million tokens that an endpoint judge reads")
    completion_price: float | None = option(None, "of a million tokens that it writes")
    max_cost: float | None = option(None, "the most to spend on each endpoint judge, earlier parts of the run included")
    concurrency: int = option(8, "most requests in flight for each endpoint")
    request_timeout: float = option(600.0, "seconds that one request may take")
    max_retries: int = option(6, "tries after the first, of a request or for an endpoint in a row")
    sweep_weight: tuple[float, ...] = option(
        (), "try this weight on development prompts, and go on with the one that wins most; may repeat"
    )
    sweep_rule: tuple[str, ...] = option((), "with this rule; may repeat [default: --rule]", metavar="RULE")
    max_kl: float | None = option(None, "nats per sequence that the pick of a sweep may be away from the proposal")
    dev_dataset: str | None = option(None, "development prompts of a sweep [default: a part of --dataset]", metavar="D")
    dev_fraction: float = option(0.2, "the part, drawn by prompt")
    seed: int = option(0, "prompt i is answered with this seed + i; the same seed gives the same text, in float32 [default: 0]")
    out: str | None = option(None, "the folder to write; a run that is started again goes on", metavar="DIR")
    max_tokens: int = option(512, "most tokens of an answer")
    expected_aligner: str | None = option(None, "for --dry_run: the same for every --aligner", metavar="A", kept=True)

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        Limits(self.concurrency, self.request_timeout, self.max_retries)

    def idle(self) -> dict[str, str]:
        """What is for other systems, other judges, a sweep, or no annotations."""
        from trimtab.cli.eval_checks import idle_options

        return idle_options(self)


def run(options: Options) -> dict[str, Any]:
    """Summarise a file, or compare two systems."""
    if options.annotations is not None:
        return _summarise(options)
    from trimtab.cli.eval_setup import evaluate

    if options.out is None:
        raise UsageError("--out is required, or --annotations")
    if options.dry_run:
        from trimtab.cli.eval_dry_run import rehearse

        return rehearse(options)
    return evaluate(options)


def render(report: dict[str, Any]) -> str:
    """The figures that matter."""
    if "dry_run" in report:
        from trimtab.cli.eval_dry_run import render_rehearsal

        return render_rehearsal(report)
    if "judging" not in report:
        return "\n".join(_summary_lines(report))
    lines = [f"{report['title']}, {report['dataset']['prompts']} prompts"]
    for row in report["judging"]:
        lines += ["", f"{row['judge']}: {row['output_2']} against {row['output_1']}"]
        lines += _summary_lines(row) if row["n"] else [f"  no preference in {row['missing']} ({row['why_missing']})"]
    for name, figures in report.get("distribution", {}).items():
        kl = figures["kl_per_sequence"]
        lines += ["", f"{name} is {kl:.3g} nats per answer from the proposal" if kl is not None else ""]
    picked = [point for point in report.get("frontier", {}).get("points", ()) if point["picked"]]
    lines += [f"picked on development prompts: {point['rule']}, weight {point['weight']:g}" for point in picked]
    return "\n".join([*lines, "", f"report: {Path(report['out']) / 'report.html'}"])


def _summary_lines(row: dict[str, Any]) -> list[str]:
    missing = f", {row['missing']} more without a preference" if row["missing"] else ""
    controlled = _with_interval(row["length_controlled_win_rate"], row["length_controlled_interval"])
    return [
        f"  win rate           {_with_interval(row['win_rate'], row['win_rate_interval'])} of {row['n']} judgements{missing}",
        f"  length controlled  {controlled} by {row['length_controlled_by']}",
    ]


def _with_interval(rate: float, interval: list[float] | None) -> str:
    return f"{rate:.2f} %" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _summarise(options: Options) -> dict[str, Any]:
    from trimtab.evaluate.alpaca import read_annotations
    from trimtab.evaluate.winrate import summarise_annotations

    assert options.annotations is not None
    annotations = read_annotations(options.annotations)
    return summarise_annotations(
        annotations, length_control=options.length_control, seed=options.seed, source=options.annotations
    )
