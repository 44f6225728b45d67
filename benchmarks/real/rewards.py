"""Training from a validator on a real model, without wanted answers: who obeys more at the same divergence?

    make real-model && python benchmarks/real/rewards.py --out rewards

Checkable instructions (`instructions.py`): one sentence, JSON with given keys, no list, fewer than n words. The reward is 1
for an answer that obeys, else 0. `tb` and `grpo` learn from rounds of samples; `preference` from the best and the worst of 16
samples of the proposal, as many samples as there are in the rounds; best-of-8 asks the validator at every answer. All are
measured on test prompts, with samples at temperature 1: the share that obeys; KL from the proposal in nats an answer;
distinct-2; and by how much the proposal's own answers to prompts outside of the task lose likelihood. Then comes the curve of
reward against KL, on development prompts as training went. Models train in `--dtype`, and are measured in float32. Nothing is
chosen on what is reported. What is finished is kept in `--out`, which several processes may share that have other ways or
seeds; it prints Markdown.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cell import Cell, slug
from chats import Record
from constraints import obeys
from demo import Parts
from instructions import TASK
from measure import measure_outside
from opening import SEEDS, add_training, open_study
from outside import PROMPTS
from report import table
from systems import OF, System

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.evaluate.intervals import mean_interval
from trimtab.files import atomic_write, only_writer
from trimtab.hardware import describe_hardware
from trimtab.propose.call import propose
from trimtab.train.call import train
from trimtab.words import distinct

KINDS = ("one sentence", "json", "no list", "below")
MAX_TOKENS, SAMPLES = 48, 8
"""Of an answer; and of the proposal's to each test prompt, from which the best is picked."""
SAMPLES_OF_ALIGNERS = 4
"""To each test prompt at each weight."""
CURT = 3
"""Words of an answer that obeys by saying next to nothing, as rewards of this kind allow."""
DIAL = (0.5, 2.0)
"""Weights at which every aligner is measured beside the one that it was trained at."""

HEAD = ("obeyed", "KL, nats an answer", "distinct-2", "tokens", f"of at most {CURT} words")
"""The columns of `shown` but for its last one."""

logger = logging.getLogger("rewards")


class Way(NamedTuple):
    """How an aligner is trained."""

    objective: str
    settings: dict[str, Any]


class Done(NamedTuple):
    """What came of one."""

    report: dict[str, Any]
    found: dict[str, Any]
    dialled: list[dict[str, Any]]
    """At each weight of `DIAL`."""
    outside: dict[str, Any]


ROUNDS: dict[str, Any] = {
    "num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4,
    "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
}  # fmt: skip
SAMPLES_OF_A_ROUND = ROUNDS["per_device_train_batch_size"] * ROUNDS["gradient_accumulation_steps"]
NO_EXPLORING = {"tempered_share": 0.0, "replay_share": 0.0, "beta_start": 1.0}
WAYS = {
    "tb, β = .02": Way("tb", {"beta": 0.02} | NO_EXPLORING),
    "tb, β = .1": Way("tb", {"beta": 0.1} | NO_EXPLORING),
    "tb, β = .3": Way("tb", {"beta": 0.3} | NO_EXPLORING),
    "tb, β = .1, exploring": Way("tb", {"beta": 0.1}),
    "subtb, β = .1": Way("subtb", {"beta": 0.1} | NO_EXPLORING),
    "grpo, β = .04": Way("grpo", {"beta": 0.04}),
    "preference, β = .1": Way("preference", {"beta": 0.1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, 60, WAYS)
    parser.add_argument("--dtype", default="bfloat16", help="what is trained in [default: %(default)s]")
    print(run(open_study("rewards", parser)))


def run(said: argparse.Namespace) -> str:
    """Train and measure what is missing; returns the tables."""
    cell = Cell(said.out, said.proposal.resolve(), TASK, "", 0)
    parts = Parts(said.out / "parts")
    with only_writer(said.out / "lock"):
        TASK.prepare(cell.data, None)
        for part in ("train", "dev", "test"):
            write_prompts(cell, part)
        records = records_of(cell, "test")
        drawn = parts.do("sample the proposal", lambda: sample(open_model(cell), records, SAMPLES))
    before, best = figures(drawn, records), _best_of(drawn, records)
    rows = [["proposal", *shown(before, None)], [f"best of {OF}", *shown(best, None)]]
    kinds = [["proposal", *_by_kind(before, records)], [f"best of {OF}", *_by_kind(best, records)]]
    curves = []
    for name in said.way or WAYS:
        every: list[Done] = []
        for seed in said.seed or SEEDS:
            this, label = cell._replace(seed=seed), f"{name}, seed {seed}"
            with only_writer(this.out / "locks" / slug(label)):
                every.append(_done(this, name, label, parts, said, records))
            rows.append([label, *shown(every[-1].found, every[-1].outside)])
            kinds.append([label, *_by_kind(every[-1].found, records)])
            curves.append([label, _curve(every[-1].report), _spent(every[-1].report)])
        if len(every) > 1:
            rows.append([f"{name}, all seeds", *_together([one.found for one in every], [one.outside for one in every])])
        for i, weight in enumerate(DIAL):
            rows.append([f"the same at weight {weight:g}", *_together([one.dialled[i] for one in every], None)])
    head = ["", *HEAD, "harm outside, nats a token"]
    curve = [
        "",
        "reward at KL, development prompts, as training went; the last is the best",
        "of the time: sampling, passes, all else",
    ]
    return "\n\n".join([describe_hardware(), table(head, rows), table(["obeyed", *KINDS], kinds), table(curve, curves)])


def _done(cell: Cell, name: str, label: str, parts: Parts, said: argparse.Namespace, records: Sequence[Record]) -> Done:
    """One aligner, trained and measured."""
    report = parts.do(f"train {label}", lambda: _train(cell, name, said))
    system, bare = (
        cache(lambda made=made: System(made())) for made in (lambda: open_model(cell, name), lambda: open_model(cell))
    )
    found = parts.do(f"sample {label}", lambda: sample(system().model, records, SAMPLES_OF_ALIGNERS))
    outside = parts.do(f"outside {label}", lambda: measure_outside(cell, system(), bare(), PROMPTS))
    dialled = []
    for weight in DIAL:
        some = parts.do(f"sample {label} at {weight:g}", lambda: sample(system().model, records, SAMPLES_OF_ALIGNERS, weight))  # noqa: B023 - called at once
        dialled.append(figures(some, records))
    return Done(report, figures(found, records), dialled, outside)


def open_model(cell: Cell, name: str | None = None) -> AlignedModel:
    aligners = [] if name is None else [cell.model(name)]
    return AlignedModel.from_pretrained(cell.proposal, *aligners, max_num_seqs=32)


def write_prompts(cell: Cell, part: str) -> None:
    """The prompts of the kinds that count, without answers."""
    with atomic_write(cell.out / f"{part}.jsonl") as stream:
        for record in records_of(cell, part):
            stream.write(json.dumps({name: record[name] for name in ("prompt", "constraint", "group")}) + "\n")


def records_of(cell: Cell, part: str) -> list[Record]:
    return [record for record in cell.read(part) if record["constraint"]["kind"] in KINDS]


def _train(cell: Cell, name: str, said: argparse.Namespace) -> dict[str, Any]:
    """Train an aligner; returns what is worth keeping of the report."""
    way, reward = WAYS[name], f"{Path(__file__).with_name('obeyed.py')}:obeyed"
    how: dict[str, Any] = {"proposal": str(cell.proposal), "output_dir": str(cell.model(name)), "seed": cell.seed}
    how |= {"head_layers": said.head_layers, "objective": way.objective, "report_to": "none", "dtype": said.dtype}
    how |= way.settings
    if way.objective == "preference":
        drawn: dict[str, Any] = {"n": 16, "temperature": 1.0, "max_tokens": MAX_TOKENS, "reward": reward, "pairs": 4}
        drawn |= {"dtype": said.dtype, "seed": 1_000 * cell.seed, "proposal": str(cell.proposal)}
        for part, most in (("train", said.rounds * SAMPLES_OF_A_ROUND // drawn["n"]), ("dev", None)):
            propose(dataset=str(cell.out / f"{part}.jsonl"), out=str(_pairs(cell, part)), max_examples=most, **drawn)
        report = train(dataset=str(_pairs(cell, "train")), eval_dataset=str(_pairs(cell, "dev")), dev_samples=0, **how)
    else:
        data = {"dataset": str(cell.out / "train.jsonl"), "eval_dataset": str(cell.out / "dev.jsonl"), "dev_prompts": 16}
        looks = {"max_steps": said.rounds, "eval_steps": 0.25, "save_steps": 0.25, "logging_steps": 5}
        report = train(reward=(reward,), max_tokens=MAX_TOKENS, **data, **looks, **ROUNDS, **how)
    return {name: report.get(name) for name in ("metrics", "history", "seconds", "profile", "learning_rate")}


def _pairs(cell: Cell, part: str) -> Path:
    return cell.out / f"pairs-{part}-{cell.seed}.jsonl"


def sample(
    model: AlignedModel, records: Sequence[Record], n: int, weight: float | list[float] | None = None
) -> list[dict[str, Any]]:
    """So many answers to every prompt at temperature 1, at a weight of the aligner or one for each."""
    like = SamplingParams(n=n, max_tokens=MAX_TOKENS, weight=weight, logprobs=True)
    params = [replace(like, seed=100_000 + i) for i in range(len(records))]
    drawn = model.generate([record["prompt"] for record in records], params)
    found = []
    for i, one in enumerate(drawn):
        assert one.logprobs is not None
        gain = sum(one.logprobs.aligned) - sum(one.logprobs.proposal)
        found.append({"place": i // n, "text": one.text, "tokens": len(one.tokens), "gain": gain})
    return found


def figures(drawn: Sequence[dict[str, Any]], records: Sequence[Record]) -> dict[str, Any]:
    """Means for each prompt; distinct-2 of one answer to each, averaged over which one."""
    by_prompt: list[list[dict[str, Any]]] = [[] for _ in records]
    for one in drawn:
        by_prompt[one["place"]].append(one)
    judged = zip(records, by_prompt, strict=True)
    scores = [[float(obeys(record["constraint"], one["text"])) for one in some] for record, some in judged]
    columns = zip(*([one["text"].split() for one in some] for some in by_prompt), strict=True)
    different = [distinct(list(column), 2) or 0.0 for column in columns]
    return {
        "obeyed": [sum(some) / len(some) for some in scores],
        "kl": [sum(one["gain"] for one in some) / len(some) for some in by_prompt],
        "tokens": [sum(one["tokens"] for one in some) / len(some) for some in by_prompt],
        "curt": [sum(len(one["text"].split()) <= CURT for one in some) / len(some) for some in by_prompt],
        "distinct": sum(different) / len(different),
    }


def _best_of(drawn: Sequence[dict[str, Any]], records: Sequence[Record]) -> dict[str, Any]:
    """The validator's first choice of each `OF` samples of the proposal; its divergence is exact for a reward of 0 or 1.

    Which answers obey, it leaves as likely beside each other as they are; so of a prompt of which the share p obeys, KL is that
    of obeying 1 − (1 − p)^8 and p of the time. No law that obeys as often is nearer to the proposal.
    """
    by_prompt: list[list[dict[str, Any]]] = [[] for _ in records]
    for one in drawn:
        by_prompt[one["place"]].append(one)
    picked = []
    for place, (record, some) in enumerate(zip(records, by_prompt, strict=True)):
        for start in range(0, SAMPLES, OF):
            block = some[start : start + OF]
            picked.append(max(block, key=lambda one: obeys(record["constraint"], one["text"])) | {"place": place})
    shares = figures(drawn, records)["obeyed"]
    return figures(picked, records) | {"kl": [_divergence(1 - (1 - share) ** OF, share) for share in shares]}


def _divergence(p: float, q: float) -> float:
    """KL of what happens with probability p from what does with q, in nats."""
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


def shown(found: dict[str, Any], outside: dict[str, Any] | None) -> list[str]:
    cells = [_mean(found["obeyed"]), _mean(found["kl"]), f"{found['distinct']:.3f}", _mean(found["tokens"], 1)]
    cells.append(_mean(found["curt"]))
    if outside is None:
        return [*cells, ""]
    harm = sum(outside["nll"]) - sum(outside["proposal_nll"])
    return [*cells, f"{harm / sum(outside['tokens']):+.3f}"]


def _together(found: Sequence[dict[str, Any]], outside: Sequence[dict[str, Any]] | None) -> list[str]:
    """Means over seeds, of each prompt first: prompts are what the intervals are of."""
    means: dict[str, Any] = {
        name: torch.tensor([one[name] for one in found], dtype=torch.float64).mean(0).tolist()
        for name in ("obeyed", "kl", "tokens", "curt")
    }
    means["distinct"] = sum(one["distinct"] for one in found) / len(found)
    names = ("nll", "proposal_nll", "tokens")
    return shown(means, None if outside is None else {name: [sum(one[name]) for one in outside] for name in names})


def _mean(values: Sequence[float], digits: int = 3) -> str:
    here = torch.tensor(values, dtype=torch.float64)
    low, high = mean_interval(here)
    return f"{here.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _by_kind(found: dict[str, Any], records: Sequence[Record]) -> list[str]:
    """The mean share that obeys, of the prompts of each kind."""
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for record, share in zip(records, found["obeyed"], strict=True):
        shares[record["constraint"]["kind"]].append(share)
    return [f"{sum(some) / len(some):.2f}" for some in shares.values()]


def _spent(report: dict[str, Any]) -> str:
    spent = report.get("profile") or {}
    if not spent:
        return ""
    sampling, passes, whole = spent["sampling"], spent["passes"], sum(spent.values())
    return ", ".join(f"{seconds / whole:.3f}" for seconds in (sampling, passes, whole - sampling - passes))


def _curve(report: dict[str, Any]) -> str:
    """Each look."""
    looks = [row for row in report["history"] if "eval_kl" in row]
    return ", ".join(f"{row['eval_reward']:.3f} at {row['eval_kl']:.2f}" for row in looks) or "no looks at samples"


if __name__ == "__main__":
    main()
