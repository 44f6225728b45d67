"""Weak-to-strong decoding on a real model: who should write how much of an answer?

    make real-model && python benchmarks/real/handover.py --out handover

Checkable instructions (`instructions.py`). The aligner is a LoRA adapter of the proposal, fine-tuned on wanted answers: a
language model, which can begin answers alone; it is as large as the proposal, for no smaller one here is any good. It is
decoded alone, with a hand-over at several thresholds, and with the proposal by `product` and `geometric`; beside them, the head
that `trimtab train` makes by default, of half of the layers, as in `demo.py`. Nothing is chosen on what is reported. What is
finished is kept in `--out`; it prints Markdown.
"""

import argparse
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from cell import Cell
from demo import Parts, Scale, train_head
from instructions import TASK
from measure import measure_part
from opening import open_study
from report import Sums, ratio, shown, table
from systems import System

from trimtab.decode.aligned import AlignedModel
from trimtab.errors import TrimtabError
from trimtab.files import only_writer
from trimtab.hardware import describe_hardware
from trimtab.train.call import train
from trimtab.train.options import TrainOptions

PILOT, HEAD, ALONE = "pilot", "head", "proposal"
RATE = 5e-4
"""The pilot's, as of the ceilings (`lora.py`)."""

logger = logging.getLogger("handover")


class Way(NamedTuple):
    """How answers are decoded."""

    aligner: str | None
    settings: dict[str, Any]


WAYS = {
    ALONE: Way(None, {}),
    "aligner alone": Way(PILOT, {"rule": "nucleus"}),
    "hand-over at 0.5": Way(PILOT, {"handover": "confidence(window=6, threshold=0.5)"}),
    "hand-over at 0.8": Way(PILOT, {"handover": "confidence(window=6, threshold=0.8)"}),
    "hand-over at 0.95": Way(PILOT, {"handover": "confidence(window=6, threshold=0.95)"}),
    "product": Way(PILOT, {"rule": "product", "weight": 1.0}),
    "geometric": Way(PILOT, {"rule": "geometric", "weight": 0.5}),
    "head": Way(HEAD, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_examples", type=int, help="of each part: to try things out [default: all]")
    said = open_study("handover", parser)
    with only_writer(said.out / "lock"):
        print(render(run(Cell(said.out, said.proposal.resolve(), TASK, "", 0, said.max_examples))))


def run(cell: Cell) -> dict[str, Any]:
    """What was measured of each way, by its name."""
    TASK.prepare(cell.data, None, cell.max_examples)
    parts, records = Parts(cell.out / "parts"), cell.read("test")
    parts.do("train the pilot", lambda: train_pilot(cell))
    parts.do("train the head", lambda: train_head(cell.proposal, cell.data, cell.model(HEAD), Scale()))
    found = {}
    for name, way in WAYS.items():

        def judge(way: Way = way) -> dict[str, Any]:
            aligner = None if way.aligner is None else cell.model(way.aligner)
            model = AlignedModel.from_pretrained(cell.proposal, aligner, max_num_seqs=16, draft="none", **way.settings)
            return measure_part(cell, System(model), records)

        found[name] = parts.do(f"judge {name}", judge)
    return {"hardware": describe_hardware(), "ways": found}


def train_pilot(cell: Cell) -> list[dict[str, Any]]:
    """A LoRA adapter of the proposal, fine-tuned on the wanted answers; what the trainer logged."""
    options = TrainOptions(
        proposal=str(cell.proposal),
        aligner=str(cell.proposal),
        use_peft=True,
        objective="sft",
        dataset=str(cell.data / "train.jsonl"),
        eval_dataset=str(cell.data / "dev.jsonl"),
        output_dir=str(cell.model(PILOT)),
        dev_samples=0,
        training={**Scale().training, "learning_rate": RATE},
    )
    return list(train(options)["history"])


def render(report: dict[str, Any]) -> str:
    """A row for each way."""
    ways = report["ways"]
    rows = [
        (
            name,
            _share(part),
            _mean(part, "nll", part["tokens"]),
            _mean(part, "obeyed"),
            _mean(part, "right"),
            _mean(part, "rougeL"),
            f"{sum(part['answer_tokens']) / len(part['answers']):.1f}",
        )
        for name, part in ways.items()
    ]
    head = ("who writes", "tokens before the hand-over", "NLL, nats a token", "obeyed", "right", "ROUGE-L", "tokens an answer")
    return f"{table(head, rows)}\n\n{len(ways[ALONE]['prompts'])} test prompts, greedy answers, {report['hardware']}."


def _share(part: dict[str, Any]) -> str:
    """What is written before the hand-over, of all tokens; answers without one count whole."""
    places = part.get("handover_at")
    if places is None:
        return "–"
    counts = part["answer_tokens"]
    before = [count if at is None else at for at, count in zip(places, counts, strict=True)]
    handed = sum(at is not None for at in places) / len(places)
    return f"{sum(before) / sum(counts):.2f} (answers handed over: {handed:.2f})"


def _mean(part: dict[str, Any], name: str, sizes: Sequence[float] | None = None) -> str:
    """With its interval."""
    keys = zip(part["prompts"], range(len(part[name])), strict=True)
    sums: Sums = dict(zip(keys, zip(map(float, part[name]), sizes or [1.0] * len(part[name]), strict=True), strict=True))
    return shown(ratio(sums))


if __name__ == "__main__":
    try:
        main()
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from error
