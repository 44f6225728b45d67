"""How much a few preferences tell of a user, on a real model: accuracy on pairs that were not seen, after 0 to 10 that were.

    make real-model && python benchmarks/real/rewards.py --out rewards --seed 0 && python benchmarks/real/users.py --out rewards

The bank has two heads of the study of rewards, which learnt to obey instructions and came to write short. Users are planted:
one prefers the shorter of two answers, one the longer; one the answer that obeys, and one the other. No user is of the kind
that is assumed (σ(β λ·f)), and none was trained for. Pairs are of the proposal's samples to the test prompts: those of one half
of the prompts are learnt from, those of the other half are predicted. It prints Markdown; intervals are bootstraps over 200
draws.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cell import Cell
from constraints import obeys
from demo import Parts
from instructions import TASK
from opening import open_study
from report import table
from rewards import MAX_TOKENS, SAMPLES, records_of
from torch import Tensor

from trimtab.core.user_weights import fit_user_weights
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.scoring import Score
from trimtab.evaluate.intervals import mean_interval
from trimtab.files import only_writer
from trimtab.hardware import describe_hardware
from trimtab.users.features import compared
from trimtab.users.options import FitWeightsOptions

BANK = ("tb, β = .02", "grpo, β = .04")
COUNTS = (0, 1, 3, 5, 10)
KEPT = 4
"""Of the samples of each prompt."""
DRAWS = 200
MOST = 400
"""Pairs that are predicted."""

Answer = dict[str, Any]
USERS: dict[str, Callable[[Any, Answer], float]] = {
    "shorter": lambda record, one: -one["tokens"],
    "longer": lambda record, one: one["tokens"],
    "obeys": lambda record, one: obeys(record["constraint"], one["text"]),
    "does not": lambda record, one: not obeys(record["constraint"], one["text"]),
}
"""What each likes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said = open_study("users", parser)
    with only_writer(said.out / "locks" / "users"):
        print(run(said.out, said.proposal))


def run(out: Path, proposal: Path) -> str:
    """Score what is missing, and fit; returns the table."""
    cell, parts = Cell(out, proposal.resolve(), TASK, "", 0), Parts(out / "parts")
    records = records_of(cell, "test")
    drawn = [one for i, one in enumerate(parts.do("sample the proposal", lambda: _missing(out))) if i % SAMPLES < KEPT]
    model = AlignedModel.from_pretrained(cell.proposal, [cell.model(name) for name in BANK], draft="none")
    rule = model.shaping(model.defaults).rule
    inputs = parts.do("score the samples by the bank", lambda: _scored(model, records, drawn))
    scores = [Score([], [], [], tokens=[], inputs=one) for one in inputs]
    rows, seconds = [], []
    for user, likes in USERS.items():
        pairs = _pairs(records, drawn, likes)
        halves = [[pair for pair in pairs if drawn[pair[0]]["place"] % 2 == half] for half in (0, 1)]
        learnt, held = (compared(rule, [scores[i] for pair in half for i in pair]) for half in halves)
        chance = random.Random(user)
        held = held[chance.sample(range(len(held)), min(MOST, len(held)))]
        cells = []
        for count in COUNTS:
            right = []
            for _ in range(DRAWS):
                some = learnt[chance.sample(range(len(learnt)), count)]
                began = time.perf_counter()
                weights = fit_user_weights(some, torch.zeros(len(BANK)), FitWeightsOptions.beta, FitWeightsOptions.prior_scale)
                seconds.append(time.perf_counter() - began)
                right.append(_agrees(held @ weights.mean))
            cells.append(_mean(right))
        rows.append([user, *cells])
    spent = f"A fit takes {1000 * sorted(seconds)[len(seconds) // 2]:.2f} ms (median)."
    return f"{describe_hardware()}\n\n{table(['prefers what', *map(str, COUNTS)], rows)}\n\n{spent}"


def _missing(out: Path) -> Any:
    raise SystemExit(f"there are no samples in {out}: run rewards.py first")


def _scored(model: AlignedModel, records: Sequence[Any], drawn: Sequence[Answer]) -> list[list[list[float]]]:
    """Log-probabilities of each sample by the proposal and by each aligner."""
    pairs = []
    for one in drawn:
        ended = one["tokens"] < MAX_TOKENS
        pairs.append(model.encoder.pair(records[one["place"]]["prompt"], one["text"], ended=ended))
    scores = model.score([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    return [[[sum(row)] for row in score.inputs] for score in scores]


def _pairs(records: Sequence[Any], drawn: Sequence[Answer], likes: Callable[[Any, Answer], float]) -> list[tuple[int, int]]:
    """Two samples to one prompt of which the user prefers the first."""
    found = []
    for i, one in enumerate(drawn):
        for j, other in enumerate(drawn):
            if one["place"] == other["place"] and one["text"] and other["text"]:
                record = records[one["place"]]
                if likes(record, one) > likes(record, other):
                    found.append((i, j))
    return found


def _agrees(margins: Tensor) -> float:
    return float(((margins > 0).double() + (margins == 0).double() / 2).mean())


def _mean(values: Sequence[float]) -> str:
    here = torch.tensor(values, dtype=torch.float64)
    low, high = mean_interval(here)
    return f"{here.mean():.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
