"""One of the paper's tables for models of yours: the proposal and the aligned model against one baseline, by each judge.

python benchmarks/paper_tables.py ultrachat --family llama --proposal P --aligner A --apply_chat_template --out DIR
    --dataset alpaca_eval.json --baseline gpt4_turbo.json --judge https://api.openai.com/v1#gpt-4-turbo

All further flags are those of `trimtab eval`; decoding is the paper's unless they say otherwise. `--out` gets the runs of the
two systems, and `table.json` and `table.md` with the published figures beside ours.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from trimtab.cli.options import add_options, read_options
from trimtab.cli.parser import Parser
from trimtab.errors import InvalidOption, TrimtabError
from trimtab.evaluate.call import run as evaluate
from trimtab.evaluate.contests import slug
from trimtab.evaluate.options import EvalOptions
from trimtab.evaluate.paper import FAMILIES, TASKS, aligned_decoding, paper_table, proposal_decoding
from trimtab.files import atomic_write, write_json


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("paper_tables.py", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="whose decoding temperatures to take")
    add_options(parser, EvalOptions)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        given = parser.read(sys.argv[1:] if arguments is None else arguments)
        table = run(given.pop("task"), given.pop("family"), given)
    except (InvalidOption, TrimtabError, OSError) as error:
        print(f"paper_tables: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidOption) else 1
    print(render(table))
    return 0


FOR_ALIGNERS = (
    "aligner", "weight", "rule", "aligner_temperature", "draft", "draft_temperature", "num_speculative_tokens"
)  # fmt: skip
"""Flags that say nothing of the proposal alone."""


def run(task: str, family: str, given: dict[str, Any]) -> dict[str, Any]:
    wrong = [name for name in ("system", "annotations", "sweep_weight", "sweep_rule") if given.get(name)]
    if wrong:
        raise InvalidOption(f"--{wrong[0]} is not for a table of two systems: see trimtab eval")
    if not given.get("out") or given.get("baseline", "proposal") in ("proposal", "aligned"):
        raise InvalidOption("give --out, and a --baseline that is no system of the table")
    out = Path(given["out"])
    runs: dict[str, Any] = {}
    for system, decoding in (("proposal", proposal_decoding(task, family)), ("aligned", aligned_decoding(task, family))):
        mine = {"null": False, **decoding, **given, "system": system, "out": str(out / system)}
        if any("://" in judge for judge in given.get("judge", ())):
            mine.setdefault("criterion", TASKS[task].criterion)
        if system == "proposal":
            mine = {name: value for name, value in mine.items() if name not in FOR_ALIGNERS}
        label = f"{system}, {family}'s decoding"

        def beside(results: dict[str, Any], name: str = label) -> dict[str, Any]:
            return {"paper": paper_table(task, runs | {name: results["judging"]})}

        results = evaluate(read_options(EvalOptions, mine), amend=beside)
        runs[label] = results["judging"]
        if "://" in given["baseline"]:  # asked once: both rows are against the same answers
            given = given | {"baseline": str(out / system / "outputs" / f"{slug(results['systems']['baseline'])}.json")}
    table = paper_table(task, runs)
    write_json(out / "table.json", table)
    with atomic_write(out / "table.md") as stream:
        stream.write(render(table) + "\n")
    return table


def render(table: dict[str, Any]) -> str:
    lines = [f"{table['task']}: {table['metric']}", "", "| | " + " | ".join(table["columns"]) + " |"]
    lines.append("|---" * (1 + len(table["columns"])) + "|")
    for row in table["rows"]:
        name = f"{row['name']} ({'published' if row['published'] else 'measured'})"
        lines.append(f"| {name} | " + " | ".join("–" if v is None else f"{v:.2f}" for v in row["values"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
