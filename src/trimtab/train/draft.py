"""A drafter for a residual: the small model that the aligner started from, or the drafter that it came with, distilled from
the aligned model.

A residual is no language model, so its own drafts are rarely accepted. A drafter learns what the aligned model says on the
training answers: from the proposal's cached rows, the frozen aligner and its tuned weight, and with no pass of the proposal.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.objectives import acceptance, distillation
from trimtab.errors import UnsupportedModel
from trimtab.files import finite
from trimtab.models.adapter_folder import Base
from trimtab.models.aligner import DRAFT_NAME, Aligner, save_model
from trimtab.models.fingerprint import Files
from trimtab.models.loading import load_model
from trimtab.models.masks import context_of
from trimtab.models.vocabulary import vocabulary_size
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, answer_logits, collate, rows_at
from trimtab.train.distil import DistilTrainer, Target
from trimtab.train.folder import last_checkpoint
from trimtab.train.pieces import Piece
from trimtab.train.plan import Plan
from trimtab.train.progress import CompactProgress
from trimtab.train.ranks import Ranks
from trimtab.train.trainer import fit, trained

__all__ = ["CHECKPOINTS", "DraftTrainer", "check_draft_start", "draft_plan", "train_draft"]

CHECKPOINTS = "draft_checkpoints"
"""The folder in the output folder where a drafter's training keeps its checkpoints."""


def draft_plan(plan: Plan, learning_rate: float, epochs: float | None = None) -> Plan:
    """A run's plan for its drafter: as many epochs over the same updates, at twice the aligner's rate, falling as a cosine.

    Or so many `epochs`, where they are given: a head's drafter has other data.

    The best checkpoint is the one with the least loss, whatever the aligner goes by. Trackers follow the aligner alone.
    """
    own = {
        "learning_rate": 2 * learning_rate,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": None,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": "none",
    } | ({} if epochs is None else {"num_train_epochs": epochs, "max_steps": -1})
    output = f"{plan.asked.output_dir}/{CHECKPOINTS}"
    asked = dataclasses.replace(plan.asked, output_dir=output, training={**plan.asked.training, **own})
    return dataclasses.replace(plan, asked=asked)


def check_draft_start(folder: Path, vocab_size: int, length: int) -> str:
    """The fingerprint of the drafter that an aligner came with, from which a new one may start.

    Args:
        folder: where it is.
        vocab_size: tokens that it must know.
        length: tokens that it must take.

    Raises:
        ModelError: it cannot be loaded, or is no drafter for this vocabulary and length.
    """
    model, files = Files.of(partial(load_model, folder, dtype=torch.float32, device="cpu"), (folder, None))
    known, taken = model.config.vocab_size, context_of(model.config)
    if known < vocab_size or taken < length:
        raise UnsupportedModel(
            f"the drafter in {folder} knows {known} tokens and takes {taken}, but {vocab_size} and {length} are needed:"
            " remove the folder to start another one from the aligner"
        )
    return files.fingerprint


class DraftTrainer(DistilTrainer):
    """Distil a drafter from the aligned model on an `ExampleDataset` with cached rows.

    Args:
        aligner: the trained aligner; it is not trained further.
        weight: λ, the weight that it is decoded with.
        arguments: what `AlignerTrainer` takes.
    """

    figure_names: ClassVar[tuple[str, ...]] = ("kl_aligned_draft", "acceptance_on_answers")

    def __init__(self, *args: Any, aligner: Any, weight: float, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self._aligner = aligner.to(self.args.device).eval().requires_grad_(False)
        self._weight, self._temperature = weight, 1.0  # the aligner's temperature is not the drafter's own

    @torch.no_grad()
    def target(self, inputs: dict[str, Tensor]) -> Target:
        """The aligned model's rows, from one pass of the aligner."""
        with self.compute_loss_context_manager():
            logits, _ = answer_logits(self._aligner, inputs, "chosen")

        def aligned(logp: Tensor, positions: Tensor) -> Tensor:
            logq = rows_at(logits, positions, self._vocab_size, self._plan.temperatures.aligner)
            return self._rule.target(logp, [logq], logq.new_tensor([self._weight]))

        return aligned

    def figures(self, target: Tensor, piece: Piece) -> list[Tensor]:
        """KL(aligned‖draft) in nats, and the chance that a draft would stay."""
        return [distillation(target, piece.logq), acceptance(target, piece.logq)]


def train_draft(
    plan: Plan,
    output: Path,
    tokenizer: Any,
    ranks: Ranks,
    start: Base,
    weight: float,
    mean_length: float,
    learning_rate: float,
    data: Mapping[str, ExampleDataset],
) -> dict[str, Any]:
    """Distil the drafter of the finished aligner in the output folder, and save it there.

    Args:
        plan: of the run.
        output: the aligner's folder; the drafter goes into its folder `draft`.
        tokenizer: of both.
        ranks: the processes that train together.
        start: what the drafter starts from.
        weight: that the aligner is decoded at.
        mean_length: of the training answers, in tokens.
        learning_rate: the aligner's.
        data: `train_dataset` and `eval_dataset`, with cached rows.

    Returns:
        `metrics`, `history` and `seconds`.
    """
    started, own = time.monotonic(), training_arguments(draft_plan(plan, learning_rate))
    trainer = DraftTrainer(
        plan,
        vocabulary_size(tokenizer),
        mean_length,
        aligner=Aligner.from_pretrained(output, dtype=torch.float32, device="cpu").model,
        weight=weight,
        ranks=ranks,
        model=load_model(start.source, dtype=torch.float32, device="cpu", revision=start.revision),
        args=own,
        data_collator=collate,
        **data,
    )
    CompactProgress.install(trainer, "draft")
    fit(trainer, ranks.first_does(lambda: last_checkpoint(Path(own.output_dir))))
    report = {"metrics": trainer.evaluate(), "history": trainer.state.log_history, "seconds": time.monotonic() - started}
    model, weights = trained(trainer)
    ranks.first_does(lambda: save_model(model, tokenizer, output / DRAFT_NAME, weights=weights))
    return dict(finite(report))
