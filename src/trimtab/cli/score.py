"""`trimtab score`: held-out negative log-likelihood of proposal, aligner and aligned model."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from trimtab.data.options import DataOptions, LengthOptions, TemplateOptions, check_chats
from trimtab.decode.options import RowOptions, kernels_of, load_aligned_model, places_that_fit
from trimtab.errors import InvalidOption
from trimtab.options import option

__all__ = ["Options", "render", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options(DataOptions, LengthOptions, TemplateOptions, RowOptions):
    """Flags of `trimtab score`."""

    dataset: str = option("", "data in a TRL layout; 'completion' or 'chosen' is scored", required=True, metavar="D")


def run(options: Options) -> dict[str, Any]:
    """Score every record of the data set."""
    from trimtab.core.rules import parse_rule
    from trimtab.data.records import read_records
    from trimtab.data.template import refuse_idle_date
    from trimtab.evaluate.likelihood import held_out

    if not parse_rule(options.rule or "product").has_row:
        raise InvalidOption(f"--rule {options.rule} has no row in closed form, so nothing can be scored under it")
    records = read_records(options.dataset, how=options)
    check_chats(options, [record.prompt for record in records])
    model = load_aligned_model(options, options)
    refuse_idle_date(options.date, model.tokenizer)
    columns = [[r.prompt for r in records], [r.chosen for r in records], [r.source for r in records]]
    kept = places_that_fit(options, model, *columns)
    prompts, answers, sources = ([column[i] for i in kept] for column in columns)
    report = held_out(model, prompts, answers, sources)
    report |= {"left_out": len(records) - len(kept), "date": model.encoder.chat_settings["date"]}
    return report | {"kernels": kernels_of(model)}


def render(report: dict[str, Any]) -> str:
    """A small table."""
    lines = [f"{report['sequences']} sequences, {report['tokens']} tokens (end of sequence counted)", ""]
    lines.append(f"{'nats per':12}{'token':>10}{'byte':>10}")
    for name, value in report["nll"].items():
        per_byte = report["nll_per_byte"][name]
        pairs = zip(value, per_byte, strict=True) if isinstance(value, list) else [(value, per_byte)]
        lines += [f"{name:12}{_number(token)}{_number(byte)}" for token, byte in pairs]
    if "likelihood_ratio" in report:
        lines += ["", *_ratios(report)]
    if report["impossible_tokens"]:
        lines.append(f"{report['impossible_tokens']} tokens are impossible under the rule, so its likelihood is zero")
    if report["failed"]:
        lines.append(f"{report['failed']} sequences are left out: they meet a distribution that is NaN or has no token")
    return "\n".join(lines)


def _ratios(report: dict[str, Any]) -> list[str]:
    """What a share of each aligner would do, and which shares are best if that was asked for."""
    ratios, intervals = report["likelihood_ratio"], report["likelihood_ratio_interval"]
    several = isinstance(ratios, list)
    lines = []
    for i, (ratio, interval) in enumerate(zip(ratios, intervals, strict=True) if several else [(ratios, intervals)]):
        name = f"mean likelihood ratio q/p of aligner{f' {i + 1}' if several else ''}"
        lines.append(f"{name}: none can be given" if ratio is None else f"{name}: {ratio:.4f}{_verdict(ratio, interval)}")
    if report["outside_support"]:
        lines.append(f"{report['outside_support']} tokens, which the proposal cannot say at any share, have no part in it")
    if "best_shares" in report:
        best = report["best_shares"]
        if best is None:
            lines.append(
                "the best shares are solved for only where every token is possible: leave out --proposal_top_p and the like"
            )
        else:
            weights = best["weight"] if several else [best["weight"]]
            said = " ".join(f"--weight {math.floor(weight * 1e4) / 1e4:g}" for weight in weights)  # they may sum to 1, no more
            lines.append(f"best shares for these data: {said}, with {best['nll']:.4f} nats per token")
    return lines


def _verdict(ratio: float, interval: list[float] | None) -> str:
    """What a ratio means."""
    low, high = (ratio, ratio) if interval is None else interval
    said = "" if interval is None else f" [{low:.4f}, {high:.4f}]"
    slope = f"the slope at weight 0 is {ratio - 1:+.4f} nats per token"
    if low <= 1 <= high:
        return f"{said}: these data do not tell it from 1, at which a small share of it in 'mixture' changes nothing"
    does = "improves" if ratio > 1 else "worsens"
    return f"{said}: {'above' if ratio > 1 else 'below'} 1, so a small share of it in 'mixture' {does} the likelihood: {slope}"


def _number(value: float | None) -> str:
    return f"{'inf' if value is None else format(value, '.4f'):>10}"
