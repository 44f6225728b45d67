"""`trimtab evolve`: an aligner that improves from what people say, round after round."""

from typing import Any

from trimtab.loop.options import EvolveOptions as Options

__all__ = ["Options", "render", "run"]


def run(options: Options) -> dict[str, Any]:
    """Collect, sift, train, judge, and promote or keep."""
    from trimtab.loop.run import run as evolve

    return evolve(options)


def render(report: dict[str, Any]) -> str:
    """What each round came to, and what is in service."""
    shown = report["rounds"] or report["history"]
    lines = [f"round {one['round']} (from {one['incumbent'] or 'the start'}): {one['why']}" for one in shown]
    if report["waiting"] is not None:
        lines.append(f"no round is due: {report['waiting']['why']}")
    served = (
        f"round {report['current']}, {report['aligner']}" if report["current"] else report["aligner"] or "the proposal alone"
    )
    return "\n".join([*lines, f"in service: {served}", f"curve of rounds: {report['page']}"])
