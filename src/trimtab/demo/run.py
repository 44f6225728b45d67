"""The demo: pretrain a proposal on source code, align it to write docstrings, and judge it on modules that nobody saw."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.data.examples import split_by_prompt
from trimtab.data.records import Record
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.decode.scoring import Score
from trimtab.demo.corpus import Corpus, read_corpus
from trimtab.demo.pretrain import PROPOSAL, SMALL, Size, pretrain, train_tokenizer
from trimtab.demo.report import write_report
from trimtab.errors import ModelError
from trimtab.evaluate.intervals import ratio_interval
from trimtab.files import atomic_folder, atomic_write, read_json, write_json
from trimtab.hardware import describe_hardware
from trimtab.train.arguments import need_training
from trimtab.train.options import TrainOptions
from trimtab.train.run import run_training

__all__ = ["Scale", "run_demo"]

logger = logging.getLogger(__name__)

DEV_FRACTION = 0.1
"""Share of the aligners' prompts kept aside for early stopping and weights."""


class Scale(NamedTuple):
    """How much of everything; the tests run a smaller demo."""

    proposal: Size = PROPOSAL
    small: Size = SMALL
    vocab_size: int = 2048
    epochs: float = 6
    records: int | None = None
    """Use only so many records of each side."""
    shown: int = 8
    """Completions in the report."""


def run_demo(out: Path, seed: int, scale: Scale | None = None) -> dict[str, Any]:
    """Do it all, leaving `proposal/`, `aligner/`, `sft_aligner/`, `data/`, `results.json` and `report.html` in `out`.

    They appear there together at the end; until then, what an earlier demo left stays as it is. Everything but the timings
    is a function of the seed, the Python version and the number of threads.

    Raises:
        InvalidOption: the extra `train` is not installed.
    """
    need_training("the demo, which trains,")
    with atomic_folder(out) as work:
        return _run(work, out, seed, scale or Scale())


def _run(out: Path, final: Path, seed: int, scale: Scale) -> dict[str, Any]:
    """The demo in the folder `out`, which becomes `final`."""
    started = time.monotonic()
    corpus = _cut(read_corpus(), scale.records)
    _write_data(out / "data", corpus)
    sizes = len(corpus.pretrain), len(corpus.align), len(corpus.held_out)
    logger.info("data: %d modules, %d docstrings to align with, %d held out", *sizes)
    tokenizer = train_tokenizer(corpus.pretrain, scale.vocab_size)
    pretrain(corpus.pretrain, tokenizer, scale.proposal, out / "proposal", seed, "proposal")
    pretrain(corpus.pretrain, tokenizer, scale.small, out / "start", seed, "aligner's start")

    trained = {
        name: _align(out, final, name, objective, rule, seed, scale.epochs)
        for name, objective, rule in (("aligner", "likelihood", "product"), ("sft_aligner", "sft", "geometric"))
    }
    proposal = AlignedModel.from_pretrained(out / "proposal", out / "aligner")
    systems = {
        "aligned": proposal,
        "sft_aligned": AlignedModel.from_pretrained(out / "proposal", out / "sft_aligner"),
        "start_aligned": AlignedModel.from_pretrained(out / "proposal", out / "start", rule="geometric"),
    }
    controls = _tune_controls(systems, corpus.align)
    prompts, completions = zip(*((r["prompt"], r["completion"]) for r in corpus.held_out), strict=True)
    scores = {name: model.score(prompts, completions, controls.get(name)) for name, model in systems.items()}
    scores["proposal_tempered"] = proposal.score(prompts, completions, controls["proposal_tempered"])
    results = _results(scores, tokenizer.eos_token_id) | {
        "weight": {name: report["weight"] for name, report in trained.items()} | {"start": controls["start_aligned"].weight},
        "proposal_temperature": controls["proposal_tempered"].proposal_temperature,
        "cache": trained["aligner"]["cache"],
        "parameters": {name: _parameters(out / name) for name in ("proposal", "aligner")},
        "speed": _measure_speed(out, seed),
        "hardware": describe_hardware(),
        "seed": seed,
    }
    samples = _complete(systems, controls, prompts[: scale.shown], seed)
    results["seconds"] = time.monotonic() - started
    write_json(out / "results.json", results)
    histories = {name: read_json(out / name / "training.json")["history"] for name in trained}
    shown = _shown(tokenizer, corpus.held_out, scores["aligned"], samples, scale.shown)
    write_report(out / "report.html", results, histories, {n: t["weights_tried"] for n, t in trained.items()}, shown)
    return results


def _cut(corpus: Corpus, records: int | None) -> Corpus:
    return Corpus(corpus.pretrain[:records], corpus.align[:records], corpus.held_out[:records])


def _write_data(folder: Path, corpus: Corpus) -> None:
    for name in ("align", "held_out"):
        with atomic_write(folder / f"{name}.jsonl") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in getattr(corpus, name))


def _align(out: Path, final: Path, name: str, objective: str, rule: str, seed: int, epochs: float) -> dict[str, Any]:
    """Train one aligner from the small model, as `trimtab train` would."""
    options = TrainOptions(
        proposal=str(out / "proposal"),
        proposal_id=str(final / "proposal"),
        aligner=str(out / "start"),
        dataset=str(out / "data" / "align.jsonl"),
        output_dir=str(out / name),
        objective=objective,
        rule=rule,
        max_length=256,
        dev_fraction=DEV_FRACTION,
        cache_top_k=64 if rule == "product" else 256,  # for other rules the tail is spread evenly, which costs much at 64
        # so small a model has no room to be a language model, too
        objective_options={"sft_weight": 0.0} if objective == "likelihood" else {},
        dev_samples=0,  # the report has its own
        train_draft=False,  # at this size, a draft costs as much as a token
        training={
            "learning_rate": 2e-3,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 32,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.1,
            "save_total_limit": 1,
            "seed": seed,
        },
    )
    return run_training(options)


def _results(scores: dict[str, list[Score]], eos: int) -> dict[str, Any]:
    """Held-out figures of every system, with bootstrap intervals over prompts, and paired differences to the aligned one."""
    aligned = scores["aligned"]
    columns: dict[str, list[Any]] = {
        "proposal": [s.proposal for s in aligned],
        "aligner": [s.aligner for s in aligned],
        "aligned": [s.aligned for s in aligned],
        "sft_aligner": [s.aligner for s in scores["sft_aligned"]],
        "sft_aligned": [s.aligned for s in scores["sft_aligned"]],
        "start_aligned": [s.aligned for s in scores["start_aligned"]],
        "proposal_tempered": [s.aligned for s in scores["proposal_tempered"]],
    }
    nll = {name: torch.tensor([-sum(values) for values in column]) for name, column in columns.items()}
    text = {
        name: torch.tensor([
            -sum(v for v, token in zip(values, s.tokens, strict=True) if token != eos)
            for values, s in zip(column, aligned, strict=True)
        ])
        for name, column in columns.items()
    }  # fmt: skip
    tokens = torch.tensor([float(len(s.tokens)) for s in aligned])
    num_bytes = torch.tensor([float(s.num_bytes or 0) for s in aligned])

    def ratio(totals: Tensor, sizes: Tensor) -> float:
        return float(totals.double().sum() / sizes.double().sum())

    return {
        "sequences": len(aligned),
        "tokens": int(tokens.sum()),
        "nll": {name: ratio(values, tokens) for name, values in nll.items()},
        "nll_interval": {name: ratio_interval(values, tokens) for name, values in nll.items()},
        "nll_per_byte": {name: ratio(values, num_bytes) for name, values in nll.items()},
        "nll_without_eos": {name: ratio(values, tokens - 1) for name, values in text.items()},
        "gain_of_aligned_over": {
            name: {
                "nats_per_token": ratio(values - nll["aligned"], tokens),
                "interval": ratio_interval(values - nll["aligned"], tokens),
            }
            for name, values in nll.items()
            if name != "aligned"
        },
    }


def _tune_controls(systems: dict[str, AlignedModel], records: list[dict[str, str]]) -> dict[str, SamplingParams]:
    """The best settings, on the aligners' development prompts, of what needs no aligned training."""
    _, development = split_by_prompt([Record(r["prompt"], r["completion"], None, "") for r in records], DEV_FRACTION, seed=0)
    prompts, answers = [r.prompt for r in development], [r.chosen for r in development]

    def best(model: AlignedModel, tried: list[SamplingParams]) -> SamplingParams:
        return min(tried, key=lambda params: -sum(sum(s.aligned) for s in model.score(prompts, answers, params)))

    weights = [SamplingParams(weight=step / 10) for step in range(1, 9)]
    temperatures = [SamplingParams(weight=0.0, proposal_temperature=0.8 + step / 10) for step in range(8)]
    return {
        "start_aligned": best(systems["start_aligned"], weights),
        "proposal_tempered": best(systems["aligned"], temperatures),
    }


def _complete(
    systems: dict[str, AlignedModel], controls: dict[str, SamplingParams], prompts: Sequence[str], seed: int
) -> dict[str, list[str]]:
    """The same prompts and seed for every system."""
    aligned = systems["aligned"]
    systems = {"proposal": AlignedModel(aligned.proposal, (), aligned.tokenizer, aligned.eos_token_ids), **systems}
    texts = {}
    for name, model in systems.items():
        params = dataclasses.replace(controls.get(name, SamplingParams()), max_tokens=48, temperature=0.7, seed=seed)
        texts[name] = [completion.text for completion in model.generate(prompts, params)]
    return texts


def _measure_speed(out: Path, seed: int) -> dict[str, Any]:
    """What `trimtab bench` says of the two models, in a process of its own: the threads of this one are set to sleep."""
    folders = ["--proposal", str(out / "proposal"), "--aligner", str(out / "aligner")]
    settings = ["--context", "16", "--max_tokens", "48", "--temperature", "0.7", "--seed", str(seed)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "trimtab", "bench", *folders, *settings, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"the benchmark of the demo failed: {done.stderr.strip().splitlines()[-1]}")
    report = dict(json.loads(done.stdout))
    report.pop("runs")
    return report


def _shown(
    tokenizer: Any, records: Sequence[dict[str, str]], scores: Sequence[Score], samples: dict[str, list[str]], count: int
) -> list[dict[str, Any]]:
    """What the report shows of a few held-out prompts."""
    return [
        {
            "prompt": record["prompt"],
            "samples": {name: texts[i] for name, texts in samples.items()},
            "tokens": [
                {"text": tokenizer.decode([token]), "proposal": p, "aligned": a}
                for token, p, a in zip(scores[i].tokens, scores[i].proposal, scores[i].aligned, strict=True)
            ],
        }
        for i, record in enumerate(records[:count])
    ]


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
