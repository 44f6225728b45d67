"""A `Trainer`'s run between its making and its report: from the last checkpoint, to the weights that count."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerState

from trimtab.train.trainer import AlignerTrainer

__all__ = ["fit", "trained"]

logger = logging.getLogger(__name__)


def fit(trainer: AlignerTrainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one, and end with the weights that count."""
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= state.max_steps:  # transformers would train one step too many
            trainer.state = state
            best = Path(state.best_model_checkpoint or checkpoint).name
            trainer._load_from_checkpoint(
                str(checkpoint.with_name(best if trainer.args.load_best_model_at_end else checkpoint.name))
            )
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def trained(trainer: AlignerTrainer) -> tuple[Any, Any]:
    """The model, and its weights where they are spread over processes: then all take part in gathering them."""
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # the trainer turns it off, and `generate` would go by what is saved
    return model, weights
