"""The aligners of a study: each objective at its best learning rate, found in the same way for all."""

import dataclasses
from pathlib import Path
from typing import Any

from cell import DEV_FRACTION, MAX_LENGTH, Cell
from rounds import sampled_pairs

from trimtab.options import make_options
from trimtab.train.options import TrainOptions
from trimtab.train.run import run_training as train

__all__ = ["FEW", "MAIN", "METHODS", "SECOND", "best_aligner", "distil_draft", "options"]

MAIN = "likelihood, product"
SECOND = "likelihood, product, second round"

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates. Every objective is tried with the two in the middle, and then with the neighbours of its best one."""

FIRST = (3e-3, 1e-2)
"""Those in the middle."""

METHODS: dict[str, dict[str, Any]] = {
    MAIN: {"objective": "likelihood", "rule": "product"},
    SECOND: {"objective": "likelihood", "rule": "product", "start": "pretrained", "contrast": 3.0},
    "likelihood, product, without contrast": {"objective": "likelihood", "rule": "product", "contrast": 0.0},
    "likelihood, product, without sft": {"objective": "likelihood", "rule": "product", "sft_weight": 0.0},
    "likelihood, product, alone": {"objective": "likelihood", "rule": "product", "contrast": 0.0, "sft_weight": 0.0},
    "likelihood, product, uniform start": {"objective": "likelihood", "rule": "product", "start": "uniform"},
    "likelihood, geometric": {"objective": "likelihood", "rule": "geometric"},
    "sft": {"objective": "sft", "rule": "geometric"},
    "ram, alpha 1e-4": {"objective": "ram", "alpha": 1e-4, "rule": "product"},
    "ram, alpha 1e-2": {"objective": "ram", "alpha": 1e-2, "rule": "product"},
    "preference": {"objective": "preference", "rule": "product"},
}
"""The first is the default; the second goes on from it with pairs of its own samples. `ram` at alpha 0 is `sft`: one loss."""

FEW = (MAIN, SECOND, "likelihood, product, without contrast", "sft")
"""The main ones."""

TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "eval_steps": 0.25,
    "save_steps": 0.25,
    "save_total_limit": 1,
    "report_to": "none",
}


def options(cell: Cell, name: str, rate: float) -> TrainOptions:
    """A run. Where the loss sees no proposal, it belongs to all regimes of the seed."""
    stem, method = name.replace(", ", "-").replace(" ", "_"), METHODS[name]
    sees = method["objective"] == "likelihood"
    home = cell if sees else cell._replace(regime="comparable")
    rows = f"{method['rule']}-{method.get('start', 'auto')}" if sees else "plain"
    data, aligner = cell.data / "align.jsonl", cell.start
    if name == SECOND:
        aligner = best_aligner(cell, MAIN)[0]
        data = sampled_pairs(cell, aligner)
    said = dict(
        proposal=str(home.proposal),
        aligner=str(aligner),
        dataset=str(data),
        output_dir=str((home.folder if sees else cell.common) / "aligners" / f"{stem}-{rate:g}"),
        max_length=MAX_LENGTH,
        dev_fraction=DEV_FRACTION,
        cache_top_k=256 if method["rule"] == "geometric" and sees else 64,
        cache_tail_samples=None if sees else 0,
        proposal_cache=str(home.folder / "cache" / rows),
        dev_samples=0,
        train_draft=False,
        training={**TRAINING, "learning_rate": rate, "seed": cell.seed},
        **method,
    )
    return make_options(TrainOptions, None, said)


def best_aligner(cell: Cell, name: str) -> tuple[Path, dict[str, Any]]:
    """The aligner of the best rate, and its report.

    Aligners that learn alone are judged by the likelihood that they decode at their best weight, and all others by their own
    loss, both on development prompts.
    """
    alone = METHODS[name]["objective"] in ("sft", "ram")
    found: dict[float, dict[str, Any]] = {}

    def loss(rate: float) -> float:
        report = found[rate]
        return min(nll for _, nll in report["weights_tried"]) if alone else float(report["metrics"]["eval_loss"])

    untried = list(FIRST)
    while untried:
        found |= {rate: train(options(cell, name, rate)) for rate in untried}
        best = min(found, key=loss)
        place = RATES.index(best)
        untried = [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in found]
    return Path(options(cell, name, best).output_dir), found[best]


def distil_draft(aligner: Path, cell: Cell, name: str) -> Path:
    """The drafter of a finished aligner."""
    rate = float(aligner.name.rpartition("-")[2])
    train(dataclasses.replace(options(cell, name, rate), train_draft=True))
    return aligner / "draft"
