"""What steering is measured against: LoRA adapters of the proposal itself, by TRL, as if its weights were ours.

    pip install trl

TRL is not a dependency of Trimtab: it is imported here and only when a ceiling is trained. The adapters are trained on the
chats as they are, by the proposal's template; DPO's reference is the proposal without the adapter. Several rates of DPO stand
here: the one with the least loss on the development prompts is the ceiling.
"""

import importlib
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from cell import Cell

from trimtab.errors import InvalidOption
from trimtab.files import atomic_folder, read_json, write_json
from trimtab.models.loading import load_model, load_tokenizer
from trimtab.train.progress import CompactProgress

__all__ = ["CEILINGS", "Ceiling", "cost_of", "merged", "need_trl", "tune"]

RANK = 16
EPOCHS = 1
BATCH = 8
MICRO_BATCH = 2
"""Examples in memory at once: a pair of six hundred tokens has rows of a quarter of a gigabyte, several times over."""
MAX_LENGTH = 1024

REPORT = "tuning.json"
"""Written last: with it, a folder is finished."""


class Ceiling(NamedTuple):
    """How a proposal is tuned."""

    method: str
    """Of TRL: `SFT` or `DPO`, which needs pairs."""
    rate: float


CEILINGS = {
    "LoRA-SFT": Ceiling("SFT", 5e-4),
    "LoRA-DPO": Ceiling("DPO", 5e-4),
    "LoRA-DPO, rate 5e-5": Ceiling("DPO", 5e-5),
}


def need_trl() -> Any:
    """TRL, as a module.

    Raises:
        InvalidOption: it is not installed.
    """
    try:
        return importlib.import_module("trl")
    except ModuleNotFoundError as error:
        raise InvalidOption(f"the ceilings, {', '.join(CEILINGS)}, need TRL ({error}): pip install trl") from None


def tune(name: str, cell: Cell) -> Path:
    """The folder of an adapter; one that is finished is not trained again."""
    folder, ceiling = cell.model(name), CEILINGS[name]
    if not (folder / REPORT).exists():
        with atomic_folder(folder) as staging:
            report = _train(ceiling, cell, staging)
        write_json(folder / REPORT, report)
    return folder


def merged(proposal: Path, adapter: Path) -> Any:
    """The proposal with an adapter in its weights, as a transformers model."""
    from peft import PeftModel

    model = load_model(str(proposal), dtype=torch.float32, device=None)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def cost_of(folder: Path) -> dict[str, Any]:
    """Seconds of training and bytes of the adapter."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"seconds": read_json(folder / REPORT)["seconds"], "draft_seconds": None, "bytes": size}


def _train(ceiling: Ceiling, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train an adapter into a folder, and say how."""
    from datasets import Dataset
    from peft import LoraConfig

    trl = need_trl()
    columns = ("prompt", "completion") if ceiling.method == "SFT" else ("prompt", "chosen", "rejected")
    training, development = (Dataset.from_list([_row(record, columns) for record in cell.read(p)]) for p in ("train", "dev"))
    started = time.monotonic()
    with TemporaryDirectory(dir=folder) as scratch:
        arguments = getattr(trl, f"{ceiling.method}Config")(
            output_dir=scratch,
            learning_rate=ceiling.rate,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=MICRO_BATCH,
            per_device_eval_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_length=MAX_LENGTH,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="epoch",
            gradient_checkpointing=False,
            bf16=False,
            dataloader_pin_memory=False,
            report_to="none",
            seed=cell.seed,
        )
        trainer = getattr(trl, f"{ceiling.method}Trainer")(
            model=load_model(str(cell.proposal), dtype=torch.float32, device=None),
            args=arguments,
            train_dataset=training,
            eval_dataset=development,
            processing_class=load_tokenizer(str(cell.proposal)),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        )
        CompactProgress.install(trainer, cell.system)
        trainer.train()
    trainer.model.save_pretrained(folder)
    seconds = time.monotonic() - started
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"eval_loss": losses[-1], "seconds": seconds, "log": trainer.state.log_history}


def _row(record: dict[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """What TRL looks at; of pairs, SFT takes the wanted answer."""
    return {name: record[name] if name in record else record["chosen"] for name in columns}
