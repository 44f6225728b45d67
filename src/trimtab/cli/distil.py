"""`trimtab distil`: a team of aligners as one."""

from typing import Any

from trimtab.train.team_options import DistilOptions as Options

__all__ = ["Options", "render", "run"]


def run(options: Options) -> dict[str, Any]:
    """Train the student, and say how far it is from the team."""
    from trimtab.train import call

    report = call.run(options.training_run)
    report.pop("history")
    # the reward is log P_team − log P_M, and the objective at a price of 1 is its mean minus KL(student‖P_M)
    distances = {"proposal": -report["proposal"]["reward"], "student": -report["metrics"]["eval_objective"]}
    return {**report, "team": list(options.aligner), "kl_to_team": distances}


def render(report: dict[str, Any]) -> str:
    """How far proposal and student are from the team, on the development prompts."""
    lines = [f"student of {len(report['team'])} aligners in {report['output_dir']}, weight {report['weight']:g}", ""]
    lines.append("nats an answer from the team, KL(·‖team)")
    return "\n".join([*lines, *(f"{name:22}{value:10.4f}" for name, value in report["kl_to_team"].items())])
