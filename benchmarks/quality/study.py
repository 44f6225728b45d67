"""Does an aligner earn its place? Held-out negative log-likelihood of every objective under the rules that fit, with controls.

    python benchmarks/quality/study.py --dataset alpaca_eval_answers.jsonl.gz --out study --seeds 0 1 2

Proposals and the aligners' start are pretrained on answers to prompts that nothing else sees; aligners are trained by
`trimtab train`'s own code, learning rates are tuned alike, and every choice is made on development prompts. What is finished
is kept in `--out`, so the same command goes on after a kill.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from data import read_answers
from transformers import AutoTokenizer

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.demo.pretrain import Size, pretrain, train_tokenizer
from trimtab.errors import TrimtabError
from trimtab.evaluate.intervals import ratio_interval
from trimtab.files import atomic_folder, read_json, write_json
from trimtab.train.examples import split_by_prompt
from trimtab.train.options import TrainOptions
from trimtab.train.records import read_records
from trimtab.train.run import train

REGIMES = {
    "stronger": (Size(256, 4, 6500, 2e-3), Size(64, 1, 1500, 5e-3)),
    "comparable": (Size(128, 3, 3000, 3e-3), Size(64, 1, 1500, 5e-3)),
}
"""Proposal, and the model that aligners start from."""

RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates that every objective is tried with."""

METHODS: dict[str, dict[str, Any]] = {
    "likelihood, product": {"objective": "likelihood", "rule": "product"},
    "likelihood, product, uniform start": {"objective": "likelihood", "rule": "product", "start": "uniform"},
    "likelihood, geometric": {"objective": "likelihood", "rule": "geometric"},
    "sft": {"objective": "sft", "rule": "geometric"},
    "ram, alpha 1e-4": {"objective": "ram", "alpha": 1e-4, "rule": "product"},
    "ram, alpha 1e-2": {"objective": "ram", "alpha": 1e-2, "rule": "product"},
    "preference": {"objective": "preference", "rule": "product"},
}

WEIGHTS = {"product": (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0), "geometric": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}
TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
MAX_LENGTH = 192
DEV_FRACTION = 0.2


class System(NamedTuple):
    """A way to decode: who aligns, under which rule, and how it is set."""

    aligner: Path | None
    rule: str
    params: SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for regime in options.regimes:
        for seed in options.seeds:
            folder = options.out / regime / str(seed)
            if not (folder / "results.json").exists():
                make_models(folder, options.dataset, regime, seed)
                write_json(folder / "results.json", run_study(folder, seed))
            print(f"\n{regime}, seed {seed}\n\n{table(read_json(folder / 'results.json'))}", flush=True)


def make_models(folder: Path, dataset: Path, regime: str, seed: int) -> None:
    """Data, tokenizer, proposal and start, where they are not there yet."""
    texts = read_answers(dataset, seed)
    if not (folder / "data").exists():
        with atomic_folder(folder / "data") as staging:
            for name in ("align", "held_out"):
                lines = [json.dumps(pair, ensure_ascii=False) for pair in getattr(texts, name)]
                (staging / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            train_tokenizer(texts.base).save_pretrained(staging / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "data" / "tokenizer")
    for name, size, share in zip(("proposal", "start"), REGIMES[regime], (1.0, 0.25), strict=True):
        if not (folder / name / "config.json").exists():  # transformers makes the folder before there is a model
            pretrain(texts.base[: int(share * len(texts.base))], tokenizer, size, folder / name, seed, name)


def run_study(folder: Path, seed: int) -> dict[str, Any]:
    """Train every aligner at its best rate, set every system on the development prompts, and score all on held-out ones."""
    aligners = {name: best_aligner(folder, name, seed) for name in METHODS}
    systems = set_systems(folder, aligners)
    records = read_records(str(folder / "data" / "held_out.jsonl"), need="rejected")
    scores = {name: score(folder, system, records) for name, system in systems.items()}
    tokens = torch.tensor([float(len(values)) for values in next(iter(scores.values()))])
    nll = {name: torch.tensor([-sum(values) for values in found]) for name, found in scores.items()}
    main = nll["likelihood, product, weight 1"]
    rows = {
        name: {
            "nll": float(sums.sum() / tokens.sum()),
            "interval": ratio_interval(sums, tokens),
            "worse_than_main": float((sums - main).sum() / tokens.sum()),
            "worse_interval": ratio_interval(sums - main, tokens),
            "settings": settings(systems[name]),
        }
        for name, sums in nll.items()
    }
    return {"prompts": len({record.prompt for record in records}), "tokens": int(tokens.sum()), "systems": rows}


def best_aligner(folder: Path, name: str, seed: int) -> Path:
    """The aligner of the rate whose objective is least on the development prompts."""
    stem = name.replace(", ", "-").replace(" ", "_")
    found = {}
    for rate in RATES:
        out = folder / "aligners" / f"{stem}-{rate:g}"
        options = TrainOptions(
            proposal=str(folder / "proposal"),
            aligner=str(folder / "start"),
            dataset=str(folder / "data" / "align.jsonl"),
            output_dir=str(out),
            max_length=MAX_LENGTH,
            dev_fraction=DEV_FRACTION,
            cache_top_k=256 if METHODS[name]["rule"] == "geometric" else 64,
            proposal_cache=str(folder / "cache" / stem),
            train_draft=False,
            training={
                "learning_rate": rate, "num_train_epochs": 4, "per_device_train_batch_size": 16, "weight_decay": 0.1,
                "per_device_eval_batch_size": 32, "lr_scheduler_type": "cosine", "save_total_limit": 1, "seed": seed,
            },
            **METHODS[name],
        )  # fmt: skip
        report = train(options)
        found[report["metrics"]["eval_loss"]] = out
    return found[min(found)]


def set_systems(folder: Path, aligners: dict[str, Path]) -> dict[str, System]:
    """Every system with its settings, chosen on the development prompts where there is a choice."""
    records = read_records(str(folder / "data" / "align.jsonl"), need="rejected")
    _, development = split_by_prompt(records, DEV_FRACTION, seed=0)

    def best(tried: list[System]) -> System:
        return min(tried, key=lambda system: -sum(map(sum, score(folder, system, development))))

    def tuned(aligner: Path, rule: str, **warps: float) -> System:
        return best([System(aligner, rule, SamplingParams(weight=w, **warps)) for w in WEIGHTS[rule]])

    own = aligners["likelihood, product"]
    systems = {
        "proposal": System(None, "product", SamplingParams()),
        "proposal, tempered": best(
            [System(own, "product", SamplingParams(weight=0.0, proposal_temperature=t)) for t in TEMPERATURES]
        ),
        "start, geometric, tuned": tuned(folder / "start", "geometric"),
        "sft, geometric, tuned": tuned(aligners["sft"], "geometric"),
    }
    for name in ("sft", "ram, alpha 1e-4", "ram, alpha 1e-2", "preference"):
        plain = {"proposal_temperature": 1.0, "aligner_temperature": 1.0}
        systems[f"{name}, product, weight 1"] = System(aligners[name], "product", SamplingParams(weight=1.0, **plain))
        systems[f"{name}, product, tuned"] = tuned(aligners[name], "product", **plain)
    systems["likelihood, geometric, tuned"] = tuned(aligners["likelihood, geometric"], "geometric")
    for name in ("likelihood, product", "likelihood, product, uniform start"):
        systems[f"{name}, weight 1"] = System(aligners[name], "product", SamplingParams(weight=1.0))
    return systems


def score(folder: Path, system: System, records: list[Any]) -> list[list[float]]:
    """Log-probabilities of the wanted answers' tokens. As in training, an answer that is cut has no end of sequence."""
    aligners = [] if system.aligner is None else [system.aligner]
    rule = system.rule if aligners else None
    model = AlignedModel.from_pretrained(folder / "proposal", aligners, rule=rule, draft="none")
    prompts, answers, cut = [], [], []
    for record in records:
        room = MAX_LENGTH - len(model.tokenizer(record.prompt)["input_ids"])
        if room > 8:
            ids = model.tokenizer(record.chosen)["input_ids"]
            prompts.append(record.prompt)
            answers.append(model.tokenizer.decode(ids[:room]))
            cut.append(len(ids) > room)
    scores = model.score(prompts, answers, system.params)
    return [one.aligned[:-1] if short else one.aligned for one, short in zip(scores, cut, strict=True)]


def settings(system: System) -> dict[str, Any]:
    """What was chosen."""
    names = ("weight", "proposal_temperature", "aligner_temperature")
    return {name: getattr(system.params, name) for name in names if getattr(system.params, name) is not None}


def table(results: dict[str, Any]) -> str:
    """A table in Markdown."""
    lines = ["| system | NLL, nats a token | worse than likelihood, product, weight 1 | settings |", "|---|---|---|---|"]
    for name, row in sorted(results["systems"].items(), key=lambda item: item[1]["nll"]):
        spread, apart = ("[{:.3f}, {:.3f}]".format(*row[key]) for key in ("interval", "worse_interval"))
        said = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
        lines.append(f"| {name} | {row['nll']:.3f} {spread} | {row['worse_than_main']:+.3f} {apart} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from error
