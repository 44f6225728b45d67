"""`trimtab eval`: is the aligned model better, by how much, for which prompts, how far has it moved, and what does it cost?"""

from pathlib import Path
from typing import Any

from trimtab.evaluate.call import run
from trimtab.evaluate.options import EvalOptions as Options

__all__ = ["Options", "render", "run"]


def render(report: dict[str, Any]) -> str:
    """The figures that matter."""
    if "dry_run" in report:
        from trimtab.evaluate.dry_run import render_rehearsal

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
