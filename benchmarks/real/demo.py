"""The whole path on a real model within six minutes: convert, align, judge, show. `make demo-real` calls this.

    python benchmarks/real/demo.py [--out DIR] [--proposal MODEL]

SmolLM2-135M-Instruct is asked for the docstrings of functions of the standard library. It answers as it is, with six examples
in the prompt, and aligned by a head that was trained on docstrings of other modules. `report.html` shows the answers side by
side and the figures, which `report.json` holds, too. What is finished is kept in `DIR`: after a kill, the same command goes on.
"""

import argparse
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cell import Cell
from chats import Record, Task
from demo_report import write_report
from docstrings import TASK
from fetch import FILE
from measure import WARM_UP, measure_part, measure_speed
from rivals import PROPOSAL, SIX, examples
from systems import System
from trained import cost_of

from trimtab.decode.aligned import AlignedModel
from trimtab.errors import InvalidOption, TrimtabError
from trimtab.evaluate.intervals import mean_interval, ratio_interval
from trimtab.files import only_writer, read_json, write_json
from trimtab.hardware import describe_hardware, keep_freed_memory
from trimtab.models.loading import load_model, quiet_loading
from trimtab.train.options import TrainOptions
from trimtab.train.run import run_training as train

__all__ = ["ALIGNED", "Parts", "Scale", "run_demo", "train_head"]

ALIGNED = "aligned"
METRICS = ("rougeL", "chrf")
"""Of answers against the real docstrings."""

logger = logging.getLogger("demo")


class Scale(NamedTuple):
    """How much of everything; the tests run a smaller demo.

    Attributes:
        train: the most docstrings to learn from.
        test: prompts to be judged on.
        max_tokens: of an answer.
        head_layers: that the head runs again; None for the default.
        keep_samples: of the proposal's own that the head is to leave alone.
        shown: answers in the report.
        speed: prompts that the speed is measured on.
        training: arguments of the trainer.
    """

    train: int = 400
    test: int = 40
    max_tokens: int = 48
    head_layers: int | None = 15
    keep_samples: int = 32
    shown: int = 8
    speed: int = 5
    training: Mapping[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "eval_steps": 0.25,
        "save_steps": 0.25,
        "report_to": "none",
    }


class Parts:
    """The parts of a run: each is done once, and what came of it is kept with the seconds that it took.

    Attributes:
        seconds: by part, of the clock.
        cpu_seconds: by part, of all threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def do(self, name: str, make: Callable[[], Any]) -> Any:
        """What a part made, now or before a kill."""
        path = self._folder / f"{name.replace(' ', '_')}.json"
        if path.exists():
            logger.info("%s: kept from before", name)
        else:
            logger.info("%s …", name)
            clock, processor = time.monotonic(), time.process_time()
            made = make()
            spent = {"seconds": time.monotonic() - clock, "cpu_seconds": time.process_time() - processor}
            write_json(path, {"made": made, **spent})
            logger.info("%s: %.0f s", name, spent["seconds"])
        found = read_json(path)
        self.seconds[name], self.cpu_seconds[name] = found["seconds"], found["cpu_seconds"]
        return found["made"]


def run_demo(out: Path, proposal: Path, scale: Scale | None = None, task: Task = TASK) -> dict[str, Any]:
    """Do it all, leaving `report.html`, `report.json` and the head in `out`; the report.

    Raises:
        InvalidOption: `out` was begun with other settings.
        TrimtabError: the model cannot be read, or something else cannot be done.
    """
    scale = scale or Scale()
    cell = Cell(out, proposal.resolve(), task._replace(max_tokens=scale.max_tokens), ALIGNED, seed=0)
    with only_writer(out / "lock"):
        _check_settings(out, {"proposal": str(cell.proposal), **scale._asdict()})
        parts = Parts(out / "parts")
        parts.do("convert the model", lambda: _convert(cell.proposal))
        parts.do("read the standard library", lambda: cell.task.prepare(cell.data, None, scale.train))
        records = list({record["group"]: record for record in cell.read("test")}.values())[: scale.test]  # each prompt once
        history = parts.do("train the head", lambda: train_head(cell.proposal, cell.data, cell.model("head"), scale))
        systems = _open(cell)
        judged = {name: parts.do(f"judge {name}", lambda s=s: _judge(cell, s, records)) for name, s in systems.items()}
        chats = [record["prompt"] for record in records[: scale.speed + WARM_UP]]
        speed = parts.do("measure the speed", lambda: measure_speed(cell.proposal, systems[ALIGNED], chats))
        report = {
            "model": cell.proposal.name,
            "hardware": describe_hardware(),
            "head": _describe_head(cell),
            "prompts": len(records),
            "max_tokens": scale.max_tokens,
            "systems": {name: _summary(found) for name, found in judged.items()},
            "gains": {name: _gains(judged[ALIGNED], judged[name]) for name in (PROPOSAL, SIX)},
            "speed": speed,
            "seconds": parts.seconds,
            "cpu_seconds": parts.cpu_seconds,
            "history": history,
            "shown": [_show(record, judged, i) for i, record in enumerate(records[: scale.shown])],
        }
        write_json(out / "report.json", report)
        write_report(out / "report.html", report)
    return report


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / "settings.json"
    if not path.exists():
        write_json(path, settings)
    elif (there := read_json(path)) != settings:
        raise InvalidOption(
            f"out: '{out}' was begun with {there}, and now it is {dict(settings)}: remove it, or choose another"
        )


def _convert(proposal: Path) -> None:
    """Load a model once: a GGUF file is then in the user's cache as a folder."""
    load_model(str(proposal), dtype=torch.float32, device=None)


def train_head(proposal: Path, data: Path, out: Path, scale: Scale) -> list[dict[str, Any]]:
    """Train a head into `out`, as `trimtab train` does without `--aligner`; what the trainer logged."""
    options = TrainOptions(
        proposal=str(proposal),
        dataset=str(data / "train.jsonl"),
        eval_dataset=str(data / "dev.jsonl"),
        output_dir=str(out),
        head_layers=scale.head_layers,
        keep_samples=scale.keep_samples,
        dev_samples=0,
        training=dict(scale.training),
    )
    return list(train(options)["history"])


def _open(cell: Cell) -> dict[str, System]:
    """Who is judged, by name."""
    aligned = AlignedModel.from_pretrained(cell.proposal, cell.model("head"), max_num_seqs=16)
    bare = System(AlignedModel(aligned.proposal, (), aligned.tokenizer, aligned.eos_token_ids, max_num_seqs=16))
    return {PROPOSAL: bare, SIX: dataclasses.replace(bare, before=examples(cell)), ALIGNED: System(aligned)}


def _judge(cell: Cell, system: System, records: list[Record]) -> dict[str, Any]:
    """What `measure_part` finds, and the tokens of each prompt."""
    shown = system.prompts([record["prompt"] for record in records])
    return {
        "prompt_tokens": [len(system.model.encoder.prompt(chat, "prompt")) for chat in shown],
        **measure_part(cell, system, records),
    }


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a system: each a mean with the 95 % interval over prompts."""
    return {
        "nll": _ratio(found["nll"], found["tokens"]),
        **{name: _mean(found[name]) for name in METRICS},
        "ended": found["finish_reasons"].count("stop") / len(found["finish_reasons"]),
        "prompt_tokens": sum(found["prompt_tokens"]) / len(found["prompt_tokens"]),
    }


def _gains(aligned: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The aligned model's figures less another system's, paired by prompt."""
    return {
        "nll": _ratio(_minus(aligned["nll"], other["nll"]), aligned["tokens"]),
        **{name: _mean(_minus(aligned[name], other[name])) for name in METRICS},
    }


def _minus(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _ratio(totals: list[float], sizes: list[int]) -> dict[str, Any]:
    return {"mean": sum(totals) / sum(sizes), "interval": ratio_interval(torch.tensor(totals), torch.tensor(sizes))}


def _mean(values: list[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "interval": mean_interval(torch.tensor(values))}


def _describe_head(cell: Cell) -> dict[str, Any]:
    folder = cell.model("head")
    head = read_json(folder / "trimtab.json")["head"]
    layers = {"layers": head["layers"] - head["tap"], "proposal_layers": head["layers"]}
    return {"folder": str(folder), "learnt_from": len(cell.read("train")), **layers, **cost_of(folder)}


def _show(record: Record, judged: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What was asked, what stands in the library, and what everybody said; what was cut ends in dots."""
    answers = {
        name: found["answers"][index] + " …" * (found["finish_reasons"][index] == "length") for name, found in judged.items()
    }
    return {"asked": record["group"], "real": record["completion"][0]["content"], "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-real-out"), help="[default: %(default)s]")
    parser.add_argument("--proposal", type=Path, default=Path("real-model") / FILE, help="[default: %(default)s]")
    said = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("demo", "trimtab"):
        logging.getLogger(name).setLevel(logging.INFO)
    keep_freed_memory()
    quiet_loading()
    if not said.proposal.exists():
        raise InvalidOption(f"proposal: there is no '{said.proposal}'; `make real-model` fetches it")
    report = run_demo(said.out, said.proposal)
    head, data = report["head"]["folder"], said.out / "docstrings" / "data" / "test.jsonl"
    print(f"{sum(report['seconds'].values()):.0f} seconds. Open {said.out / 'report.html'}, or go on:")
    print(f"  trimtab generate --proposal {said.proposal} --aligner {head} --input {data} --temperature 0")
    print(f"  trimtab serve --proposal {said.proposal} --aligner docstrings={head}")


if __name__ == "__main__":
    try:
        main()
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from error
