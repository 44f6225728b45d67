"""Systems that `trimtab train` makes: **to add one, add a line to `TRAINED`**.

A line is what stands behind `trimtab train` beside `COMMON`. In braces: `proposal`, `train` and `dev` (files), `out` (the
folder to make), `seed`, and `start`, the aligner's start that most need, which is the proposal's first two layers as they are.
Every name is a system of the study, and a second one with six examples in the prompt.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cell import Cell

from trimtab.errors import TrimtabError
from trimtab.files import atomic_folder, read_json
from trimtab.models.layers import pick_layers
from trimtab.models.loading import load_model, load_tokenizer

__all__ = ["DEFAULT", "HEAD", "LAYERS", "SFT", "TRAINED", "command", "cost_of", "learns_pairs", "start_of", "train"]

HEAD = "head"
DEFAULT = "toy default"
SFT = "SFT, geometric"

TRAINED = {
    HEAD: "",
    "head, drafter": "--train_draft true",
    "head, preference": "--objective preference",
    "head, no kept samples": "--keep_samples 0",
    "head of 20 layers": "--head_layers 20",
    DEFAULT: "--aligner {start}",
    SFT: "--aligner {start} --objective sft --rule geometric",
}

COMMON = (
    "--proposal {proposal} --dataset {train} --eval_dataset {dev} --output_dir {out} --seed {seed} --report_to none"
    " --per_device_train_batch_size 2 --gradient_accumulation_steps 4"
)
"""An update is what eight examples at once would give; two at a time are what memory has room for, as in lora.py."""

LAYERS = 2
"""Of the proposal, that its aligners start from."""


def train(name: str, cell: Cell) -> Path:
    """The folder of a trained system; a run that was killed goes on, and one that is done is not repeated.

    Raises:
        TrimtabError: the command failed; its output says why.
    """
    out = cell.model(name)
    if not (out / "training.json").exists():
        words = command(name, cell)
        done = subprocess.run([sys.executable, "-m", "trimtab", *words], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise TrimtabError(f"trimtab {' '.join(words)} ended with exit status {done.returncode}")
    return out


def command(name: str, cell: Cell) -> list[str]:
    """The words behind `trimtab` that make a system; its start is made where it is not there yet."""
    line = f"train {TRAINED[name]} {COMMON}"
    places = {"proposal": cell.proposal, "train": cell.data / "train.jsonl", "dev": cell.data / "dev.jsonl", "seed": cell.seed}
    if "{start}" in line:
        places["start"] = start_of(cell)
    return [word.format(out=cell.model(name), **places) for word in line.split()]


def learns_pairs(name: str) -> bool:
    """Whether a system needs unwanted answers."""
    return "--objective preference" in TRAINED[name]


def start_of(cell: Cell) -> Path:
    """The aligners' start, for all cells of a study."""
    folder = cell.out / "start"
    if not (folder / "config.json").exists():
        with atomic_folder(folder) as staging:
            pick_layers(load_model(cell.proposal, dtype=torch.float32, device="cpu"), range(LAYERS)).save_pretrained(staging)
            load_tokenizer(cell.proposal).save_pretrained(staging)
    return folder


def cost_of(folder: Path) -> dict[str, Any]:
    """Seconds of training, with the drafter's apart, and bytes of the aligner's weights."""
    report = read_json(folder / "training.json")
    return {
        "seconds": report["seconds"],
        "draft_seconds": report.get("draft", {}).get("seconds"),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }
