"""A team of two aligners of the study of rewards, and the one aligner that they are distilled into.

    make real-model && python benchmarks/real/rewards.py --out rewards --seed 0 && python benchmarks/real/team.py --out rewards

The team is the aligners of `tb` and of `grpo`, both at weight 1 under `geometric`, the rule of heads: P_M·(q₁/P_M)·(q₂/P_M).
`trimtab distil` makes one head of them, from samples of its own to the training prompts. All are measured on the test prompts
of the study, with samples at temperature 1: the share that obeys, KL from the proposal, and the time of a token. What is
finished is kept in `--out`; it prints Markdown.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cell import Cell
from demo import Parts
from instructions import TASK
from opening import add_training, open_study
from report import table
from rewards import HEAD, MAX_TOKENS, ROUNDS, SAMPLES_OF_ALIGNERS, figures, records_of, sample, shown

from trimtab.decode.aligned import AlignedModel
from trimtab.files import only_writer
from trimtab.hardware import describe_hardware
from trimtab.train.call import run as train
from trimtab.train.team_options import DistilOptions

MEMBERS = ("tb, β = .1", "grpo, β = .04")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, 45)
    parser.add_argument("--dtype", default="bfloat16", help="what is trained in [default: %(default)s]")
    said = open_study("team", parser)
    with only_writer(said.out / "locks" / "team"):
        print(run(said))


def run(said: argparse.Namespace) -> str:
    """Distil and measure what is missing; returns the table."""
    cell = Cell(said.out, said.proposal.resolve(), TASK, "", 0)
    parts, records = Parts(said.out / "parts"), records_of(cell, "test")
    members, student = [cell.model(name) for name in MEMBERS], cell.model("distilled team")
    report = parts.do("train the distilled team", lambda: _distil(cell, members, student, said))
    rows = []
    for name, aligners in zip((*MEMBERS, "team", "distilled"), ([members[0]], [members[1]], members, [student]), strict=True):
        label = f"sample {name}, seed 0" if name in MEMBERS else f"sample the {name}"
        drawn = parts.do(label, lambda aligners=aligners: _sampled(cell, aligners, records))  # type: ignore[misc]
        seconds = parts.seconds[label] / sum(one["tokens"] for one in drawn)
        rows.append([name, *shown(figures(drawn, records), None)[:-1], f"{1000 * seconds:.1f}"])
    head = ["", *HEAD, "ms a token, at 32 together"]
    far = f"KL from the team on development prompts, nats an answer: proposal {-report['proposal']['reward']:.1f}, distilled"
    return f"{describe_hardware()}\n\n{table(head, rows)}\n\n{far} {-report['metrics']['eval_objective']:.1f}"


def _sampled(cell: Cell, aligners: Sequence[Path], records: Sequence[Any]) -> list[dict[str, Any]]:
    model = AlignedModel.from_pretrained(cell.proposal, list(aligners), max_num_seqs=32)
    return sample(model, records, SAMPLES_OF_ALIGNERS, [1.0] * len(aligners))


def _distil(cell: Cell, members: Sequence[Path], student: Path, said: argparse.Namespace) -> dict[str, Any]:
    """Train the student; returns the figures of its last look."""
    options = DistilOptions(
        proposal=str(cell.proposal),
        aligner=tuple(map(str, members)),
        weight=(1.0,) * len(members),
        dataset=str(cell.out / "train.jsonl"),
        eval_dataset=str(cell.out / "dev.jsonl"),
        output_dir=str(student),
        head_layers=said.head_layers,
        dtype=said.dtype,
        max_tokens=MAX_TOKENS,
        num_generations=ROUNDS["num_generations"],
        dev_prompts=16,
        balance={"tempered_share": 0.0, "replay_share": 0.0, "beta_start": 1.0},
        training={name: value for name, value in ROUNDS.items() if name != "num_generations"}
        | {"max_steps": said.rounds, "eval_steps": 0.25, "save_steps": 0.25, "logging_steps": 5, "report_to": "none"},
    )
    report = train(options.training_run)
    return {name: report[name] for name in ("proposal", "metrics", "seconds", "profile")}


if __name__ == "__main__":
    main()
