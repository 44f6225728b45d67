"""`trimtab propose`: samples for every prompt of a data set, or preference pairs of them."""

from typing import Any

from trimtab.models.estimates import describe_model, describe_size
from trimtab.propose.call import run
from trimtab.propose.options import ProposeOptions as Options

__all__ = ["Options", "render", "run"]


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
    if "reward" in report:
        lines.append(f"ranked by {report['reward']}")
    if model := report["reward_model"]:
        lines.append(f"ranked by {model['name']}" + ("" if model["at_hand"] else ", which is not at hand"))
    return "\n".join(lines)


def render(report: dict[str, Any]) -> str:
    """Where the samples are."""
    if "dry_run" in report:
        return _render_rehearsal(report)
    failed = f", of which {report['failed']} could not be finished" if report["failed"] else ""
    return f"{report['rows']} {'pairs' if report['pairs'] else 'samples'} in {report['out']}{failed}"
