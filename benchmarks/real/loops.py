"""Rounds of `trimtab evolve` against a planted preference, and the same with shuffled votes.

    make real-model && python benchmarks/real/loops.py --out loops
    make demo && python benchmarks/real/loops.py --out demo-loops --proposal demo-out/proposal --demo demo-out/data

In each round the aligner in service answers new prompts, eight times each. As long as some answers are liked and others are
not, a planted user votes for one that is, and one time in ten for the other, at most twice a prompt. On the real model answers
are liked that obey the prompt's instruction (`constraints.py`); on the demo's, docstrings that begin with "Return". `trimtab
evolve` learns from the votes as they stand. After each round the aligner in service answers test prompts that no round has
seen: the share that is liked, and the share of prompts at which it is liked better than what the loop began with (an equal one
is half), with bootstraps over prompts. In the control each vote is for either answer at random. Nothing is tuned; three tenths
of the prompts are held out, for rounds have few. What is finished is kept in `--out`; it prints Markdown.
"""

import argparse
import json
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from constraints import obeys
from demo import Parts
from instructions import TASK
from opening import open_study
from report import table
from rewards import KINDS

import trimtab
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.evaluate.intervals import mean_interval
from trimtab.files import only_writer
from trimtab.hardware import describe_hardware
from trimtab.jsonlines import write_rows

ANSWERS, VOTES, TESTS = 8, 2, 150
KEYS = 20
FLIPPED = 0.1
"""Of the votes are for the answer that is not liked."""

HEAD = ["seed", "round", "votes", "verdict", "wanted answers, nats a token more", "liked", "against the start"]

logger = logging.getLogger("loops")

Record = dict[str, Any]


class World(NamedTuple):
    """Who is asked what, and what is liked."""

    proposal: Path
    prompts: Sequence[Record]
    tests: Sequence[Record]
    likes: Callable[[Record, str], bool]
    each: int
    """Prompts of a round."""
    max_tokens: int
    training: dict[str, Any]
    rounds: int = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="the demo's data, whose proposal --proposal is [default: the real model]")
    parser.add_argument("--seed", type=int, action="append", help="of a loop; may repeat [default: 0]")
    parser.add_argument("--control", type=int, default=5, help="loops with shuffled votes [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[default: %(default)s]")
    parser.add_argument("--prompts", type=int, help="of a round [default: 133, of the demo 400]")
    for name, kind in (("objective", str), ("learning_rate", float), ("num_train_epochs", float)):
        parser.add_argument(f"--{name}", type=kind, help="of the rounds [default: that of trimtab evolve; three epochs]")
    said = open_study("loops", parser)
    world = _demo(said.proposal, said.demo) if said.demo else _real(said.proposal)
    given = {name: getattr(said, name) for name in ("objective", "learning_rate", "num_train_epochs")}
    world.training.update({name: value for name, value in given.items() if value is not None})
    world = world._replace(each=said.prompts or world.each, rounds=said.rounds)
    rows = []
    for seed in said.seed or [0]:
        rows += run_loop(world, said.out / f"planted-{seed}", seed, shuffled=False)
    control = [run_loop(world, said.out / f"shuffled-{seed}", seed, shuffled=True) for seed in range(said.control)]
    print(f"{describe_hardware()}\n")
    print(table(HEAD, rows))
    promoted = sum(row[3].startswith("promoted") for some in control for row in some)
    print(f"\nShuffled votes, {len(control)} loops of {world.rounds} rounds: {promoted} promoted.\n")
    print(table(HEAD, [row for some in control for row in some]))


def run_loop(world: World, out: Path, seed: int, *, shuffled: bool) -> list[list[Any]]:
    """A loop of all rounds: a row of the table for each."""
    parts, said, loop = Parts(out / "parts"), out / "said.jsonl", out / "loop"
    with only_writer(out / "lock"):
        start = [] if shuffled else parts.do("start", partial(_liked, world, None))
        rows = []
        for number in range(1, world.rounds + 1):
            served = None if number == 1 else parts.do(f"service after {number - 1}", lambda: None)
            parts.do(f"votes {number}", partial(_vote, world, served, seed, number, shuffled=shuffled))
            votes = [row for i in range(1, number + 1) for row in parts.do(f"votes {i}", lambda: [])]
            write_rows(said, votes)
            how = {"proposal": str(world.proposal), "out": str(loop), "feedback": str(said), "seed": seed, "held_out": 0.3}
            report = parts.do(f"round {number}", lambda how=how: trimtab.evolve(**how, **world.training)["rounds"][0])
            served = parts.do(f"service after {number}", lambda: trimtab.evolve(out=str(loop))["aligner"])
            liked = parts.do(f"liked {number}", partial(_liked, world, served)) if not shuffled else None
            won = "" if liked is None else _mean([(a > b) + (a == b) / 2 for a, b in zip(liked, start, strict=True)])
            low, high = report["votes"]["nll_more_interval"]
            cost = f"{report['votes']['nll_more']:+.3f} [{low:+.3f}, {high:+.3f}]"
            line = [str(seed), str(number), str(len(votes)), report["why"], cost]
            rows.append([*line, "" if liked is None else _mean(liked), won])
        if not shuffled:
            rows.insert(0, [str(seed), "0", "0", "", "", _mean(start), ""])
        return rows


def _vote(world: World, served: str | None, seed: int, number: int, *, shuffled: bool) -> list[dict[str, Any]]:
    """What users say of the answers of what is in service, to the prompts of a round."""
    chance = random.Random(f"{seed} {number} {shuffled}")
    asked = world.prompts[(number - 1) * world.each : number * world.each]
    model = _open(world, served)
    params = [SamplingParams(n=ANSWERS, max_tokens=world.max_tokens, seed=1000 * number + i) for i in range(len(asked))]
    drawn = model.generate([record["prompt"] for record in asked], params)
    rows = []
    for i, record in enumerate(asked):
        texts = [one.text for one in drawn[ANSWERS * i : ANSWERS * (i + 1)]]
        sides = [[text for text in texts if world.likes(record, text) == like] for like in (True, False)]
        for side in sides:
            chance.shuffle(side)
        for vote, (better, worse) in enumerate(zip(*(side[:VOTES] for side in sides), strict=False)):
            if chance.random() < (0.5 if shuffled else FLIPPED):
                better, worse = worse, better
            row = {"prompt": record["prompt"], "chosen": better, "rejected": worse, "key": f"user {chance.randrange(KEYS)}"}
            rows.append(row | {"time": f"round {number}, prompt {i}, {vote}"})
    return rows


def _liked(world: World, aligner: str | None) -> list[float]:
    """Of each test prompt the share of its answers that is liked."""
    model = _open(world, aligner)
    params = [SamplingParams(n=ANSWERS, max_tokens=world.max_tokens, seed=i) for i in range(len(world.tests))]
    drawn = model.generate([record["prompt"] for record in world.tests], params)
    liked = [world.likes(world.tests[i // ANSWERS], one.text) for i, one in enumerate(drawn)]
    return [sum(liked[i : i + ANSWERS]) / ANSWERS for i in range(0, len(liked), ANSWERS)]


def _open(world: World, aligner: str | None) -> AlignedModel:
    return AlignedModel.from_pretrained(world.proposal, aligner, draft="none", dtype="float32")


def _real(proposal: Path) -> World:
    parts = {name: [r for r in records if r["constraint"]["kind"] in KINDS] for name, records in TASK.make(None).items()}
    training = {"head_layers": 10, "max_length": 256, "num_train_epochs": 3, "report_to": "none"}
    asked, tests = parts["train"], parts["test"][:TESTS]
    return World(proposal, asked, tests, lambda record, text: obeys(record["constraint"], text), 133, 48, training)


def _demo(proposal: Path, data: Path) -> World:
    def read(name: str) -> list[Record]:
        return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]

    training = {"max_length": 256, "num_train_epochs": 3, "report_to": "none"}
    prompts, tests = read("align.jsonl"), read("held_out.jsonl")[:TESTS]
    random.Random(0).shuffle(prompts)
    return World(proposal, prompts, tests, lambda _, text: text.strip().startswith("Return"), 400, 24, training)


def _mean(values: Sequence[float]) -> str:
    low, high = mean_interval(torch.tensor(values, dtype=torch.float64))
    return f"{sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
