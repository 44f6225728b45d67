"""`trimtab fit-weights`: a user's weights of several aligners, from a few preferences."""

import shlex
from typing import Any

from trimtab.users.options import FitWeightsOptions as Options

__all__ = ["Options", "render", "run"]


def run(options: Options) -> dict[str, Any]:
    """Read, score, fit."""
    from trimtab.users.run import run as fit

    return fit(options)


def render(report: dict[str, Any]) -> str:
    """The weights, what they are worth, and how to decode with them."""
    lines = [f"{'aligner':20}{'weight':>10}  95 % interval"]
    for name, weight in report["weights"].items():
        low, high = report["interval"][name]
        lines.append(f"{name:20}{weight:>+10.3f}  [{low:+.3f}, {high:+.3f}]")
    agree = report["agree"]
    unseen = "" if agree["left_out"] is None else f", {agree['left_out']:.0%} by fits that leave out the pair in question"
    said = f"of {report['pairs']} pairs, {agree['fitted']:.0%} are ranked as the user has it{unseen}"
    lines += ["", f"{said}; before, {agree['before']:.0%}"]
    words = [word for name, path in report["aligners"].items() for word in _words(path, report["weights"][name])]
    lines.append(f"decode with: {shlex.join(['--rule', report['rule'], *words])}")
    return "\n".join(lines)


def _words(path: str, weight: float) -> list[str]:
    return ["--aligner", path, "--weight", f"{weight:.4g}"]
