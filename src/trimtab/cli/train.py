"""`trimtab train`: an aligner for a frozen proposal."""

from typing import Any

from trimtab.train.options import TrainOptions as Options

__all__ = ["Options", "render", "run"]


def run(options: Options) -> dict[str, Any]:
    """Train, tune the weight, save."""
    from trimtab.cli import quiet_loading
    from trimtab.train.run import train

    quiet_loading()
    report = train(options)
    report.pop("history")
    return {"output_dir": options.output_dir, **report}


def render(report: dict[str, Any]) -> str:
    """What came out of it, on the development prompts."""
    metrics = report["metrics"]
    lines = [f"aligner in {report['output_dir']}, weight {report['weight']:g}", ""]
    lines += [f"{name.removeprefix('eval_'):22}{metrics[name]:10.4f}" for name in metrics if isinstance(metrics[name], float)]
    return "\n".join(lines)
