"""What steering is measured against: the proposal itself, fine-tuned by TRL on the aligners' data, as if its weights were ours.

    proposal, SFT   all weights, on the wanted answers
    proposal, DPO   that one, on the pairs, with itself as the reference

Answers are cut as in `encode_records`: TRL appends the end of sequence before it truncates, so one that is cut has none. The
least loss on the development prompts decides on the epoch. It also decided on the rates, once for all cells: among these and a
third of them, on the comparable proposal of seed 0.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cell import DEV_FRACTION, MAX_LENGTH
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.data.examples import split_by_prompt
from trimtab.data.records import Record, read_records
from trimtab.errors import TrimtabError
from trimtab.files import atomic_folder, write_json
from trimtab.train.progress import CompactProgress

__all__ = ["ceilings", "tune_by_dpo", "tune_by_sft"]

SFT_RATE = 1e-3
DPO_RATE = 1e-4

REPORT = "tuning.json"
"""Written last: with it, a folder is finished."""


def ceilings(folder: Path, proposal: Path, dataset: Path, seed: int) -> dict[str, Path]:
    """Tune the proposal both ways, into `folder`; what is finished there is not done again.

    Args:
        folder: where models go.
        proposal: the model to tune, with its tokenizer.
        dataset: pairs to tune on.
        seed: of the order of the data.
    """
    sft, dpo = folder / "sft", folder / "dpo"
    tune_by_sft(proposal, dataset, sft, SFT_RATE, seed=seed)
    tune_by_dpo(sft, dataset, dpo, DPO_RATE, seed=seed)
    return {"proposal, SFT": sft, "proposal, DPO": dpo}


def tune_by_sft(proposal: Path, dataset: Path, out: Path, rate: float, *, seed: int, epochs: int = 2) -> None:
    """Fine-tune all weights on the wanted answers, and save the model in `out`.

    Raises:
        TrimtabError: TRL is not installed.
    """

    def row(record: Record) -> dict[str, Any]:
        return {"prompt": record.prompt, "completion": record.chosen}

    _tune("SFT", proposal, dataset, row, out, seed=seed, epochs=epochs, learning_rate=rate, completion_only_loss=True)


def tune_by_dpo(start: Path, dataset: Path, out: Path, rate: float, *, seed: int, epochs: int = 1, beta: float = 0.1) -> None:
    """Go on from a model that SFT made, which stays the reference, on the pairs; otherwise as `tune_by_sft`."""

    def row(record: Record) -> dict[str, Any]:
        return {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}

    own = {"beta": beta, "precompute_ref_log_probs": True}
    _tune("DPO", start, dataset, row, out, seed=seed, epochs=epochs, learning_rate=rate, **own)


def _tune(
    method: str, start: Path, dataset: Path, row: Callable[[Record], dict[str, Any]], out: Path, *, seed: int, epochs: int,
    **own: Any,
) -> None:  # fmt: skip
    """Train with TRL's trainer of that name, unless `out` is finished; `own` are its options."""
    if (out / REPORT).exists():
        return
    try:
        import trl
    except ModuleNotFoundError as error:
        raise TrimtabError(f"tuning the proposal needs TRL ({error}): pip install trl") from None
    from datasets import Dataset

    parts = split_by_prompt(read_records(str(dataset), need="rejected"), DEV_FRACTION, seed=0)
    training, development = (Dataset.from_list([row(record) for record in part]) for part in parts)
    started = time.monotonic()
    with atomic_folder(out) as staging:
        with TemporaryDirectory(dir=staging) as checkpoints:
            arguments = getattr(trl, f"{method}Config")(
                output_dir=checkpoints,
                num_train_epochs=epochs,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=32,
                lr_scheduler_type="cosine",
                max_length=MAX_LENGTH,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_only_model=True,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                logging_strategy="epoch",
                gradient_checkpointing=False,
                bf16=False,
                dataloader_pin_memory=False,
                report_to="none",
                seed=seed,
                **own,
            )
            trainer = getattr(trl, f"{method}Trainer")(
                model=AutoModelForCausalLM.from_pretrained(start),
                args=arguments,
                train_dataset=training,
                eval_dataset=development,
                processing_class=AutoTokenizer.from_pretrained(start),
            )
            CompactProgress.install(trainer, out.name)
            trainer.train()
        for config in (trainer.model.config, trainer.model.generation_config):
            config.use_cache, config.pad_token_id = True, None  # trainers turn it off, and name a token of their own
        trainer.model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(start).save_pretrained(staging)
    report = {"eval_loss": trainer.state.best_metric, "seconds": time.monotonic() - started, "log": trainer.state.log_history}
    write_json(out / REPORT, report)
