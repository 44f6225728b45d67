"""Is an aligner for a real model better than what users try first? Every task by every system, one file a cell.

    make real-model && . .venv/bin/activate && pip install -c constraints.txt '.[train,eval,gguf]' && pip install trl
    python benchmarks/real/study.py --out real --data ../shared/data
    python benchmarks/real/report.py real > benchmarks/REAL.md

`--data` is a folder with hh_harmless.jsonl.gz and alpaca_eval_answers.jsonl.gz; without it the tasks that need them are left
out. Aligners are trained by `trimtab train` itself; to add one, add its command line to trained.py. What is finished is kept
in `--out`, so the same command goes on after a kill, and more tasks, systems and seeds may be asked for later.
"""

import argparse
import itertools
import logging
import time
from pathlib import Path

import docstrings
import hh
import instructions
import lora
import short_answers
from cell import Cell
from chats import Task
from fetch import FILE
from measure import measure
from rivals import EXAMPLES, RIVALS

from trimtab.errors import InvalidOption, TrimtabError
from trimtab.files import only_writer, read_json, write_json
from trimtab.hardware import describe_hardware
from trimtab.models.loading import quiet_loading

TASKS = {task.name: task for task in (docstrings.TASK, hh.TASK, instructions.TASK, short_answers.TASK)}

logger = logging.getLogger("study")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the files that two of the tasks need [default: none]")
    parser.add_argument("--proposal", type=Path, default=Path("real-model") / FILE, help="[default: %(default)s]")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--systems", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="SYSTEM", help=", ".join(RIVALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--max_examples", type=int, help="of each part: to try things out [default: all]")
    said = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    quiet_loading()
    if not said.proposal.exists():
        raise InvalidOption(f"proposal: there is no '{said.proposal}'; `make real-model` fetches it")
    if said.max_examples is not None and said.max_examples < EXAMPLES:
        raise InvalidOption(f"max_examples must be at least {EXAMPLES}, the examples in a prompt, not {said.max_examples}")
    if any(RIVALS[name].needs_trl for name in said.systems):
        lora.need_trl()
    with only_writer(said.out / "lock"):
        check_settings(said.out, {"proposal": str(said.proposal.resolve()), "max_examples": said.max_examples})
        base = Cell(said.out, said.proposal.resolve(), docstrings.TASK, "", 0, said.max_examples)
        for cell in cells(base, prepared(base, said.tasks, said.data), said.systems, said.seeds):
            run(cell)


def check_settings(out: Path, settings: dict[str, object]) -> None:
    """Results of different settings are not mixed.

    Raises:
        InvalidOption: the folder has those of others.
    """
    path = out / "study.json"
    if not path.exists():
        write_json(path, settings)
    elif (there := read_json(path)) != settings:
        raise InvalidOption(f"out: '{out}' was begun with {there}, and now it is {settings}: choose another")


def prepared(base: Cell, names: list[str], data: Path | None) -> list[Task]:
    """The tasks that can be had; their data are written."""
    found = []
    for task in (TASKS[name] for name in names):
        if task.file is not None and data is None:
            logger.warning("%s: left out, for it needs %s: give --data", task.name, task.file)
            continue
        task.prepare(base._replace(task=task).data, data, base.max_examples)
        found.append(task)
    return found


def cells(base: Cell, tasks: list[Task], systems: list[str], seeds: list[int]) -> list[Cell]:
    """All that are asked for and make sense: a system that no seed changes has the first one only."""
    found = []
    for task, system, seed in itertools.product(tasks, systems, seeds):
        cell, rival = base._replace(task=task, system=system, seed=seed), RIVALS[system]
        if (rival.seeded or seed == seeds[0]) and (cell.has_pairs or not rival.needs_pairs):
            found.append(cell)
    return found


def run(cell: Cell) -> None:
    """Measure a cell that was not measured yet."""
    if cell.result.exists():
        return
    started = time.monotonic()
    about = {"task": cell.task.name, "system": cell.system, "seed": cell.seed, "hardware": describe_hardware()}
    write_json(cell.result, about | measure(cell))
    logger.info("%s: %.0f s", cell.result, time.monotonic() - started)


if __name__ == "__main__":
    try:
        main()
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from error
