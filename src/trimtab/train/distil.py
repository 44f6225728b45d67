"""Distil one model into a smaller one on answers: KL(target‖student) of whole rows, with no pass of the proposal.

The target comes from the proposal's cached rows. Here it is the proposal itself, which makes its small sibling a language model
(`trimtab.train.sibling`); a `DraftTrainer`'s is the aligned model.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from trimtab.core.objectives import acceptance, distillation, sft
from trimtab.train.batches import answer_logits, cached_rows, rows_at
from trimtab.train.pieces import Piece, token_counts
from trimtab.train.trainer import AlignerTrainer

__all__ = ["DistilTrainer", "Target"]

Target: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From log p̃ `[n, V]` at n positions of a batch's logits, and those positions `[n]`, to the rows that are wanted there."""


class DistilTrainer(AlignerTrainer):
    """Distil a start from the proposal on an `ExampleDataset` with cached rows; the arguments are `AlignerTrainer`'s."""

    figure_names: ClassVar[tuple[str, ...]] = ("nll_proposal", "nll_start", "kl_proposal_start", "acceptance_on_answers")
    has_proposal = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """KL(target‖student) of a micro-batch, weighed as an aligner's loss is."""
        logits, positions = answer_logits(model, inputs, "chosen")
        target = self.target(inputs)(cached_rows(inputs, self._vocab_size), positions)
        losses = distillation(target, rows_at(logits, positions, self._vocab_size))
        loss = self._weigh(losses, inputs)
        return (loss, {}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """On the development answers: the loss, and `figures`, averaged over tokens."""
        sums = torch.zeros(3 + len(self.figure_names), dtype=torch.float64)
        for inputs, passes in self.development(eval_dataset):
            target_of = self.target(inputs)
            for _, some in passes:
                for piece in some:
                    columns, often = self.measure(target_of, piece), token_counts(inputs, "chosen", piece)
                    sums[2:] += torch.stack([(column.double() * often).sum() for column in columns]).cpu()
                    sums[1] += float(often.sum())
            sums[0] += float(inputs["weight"].double().sum())
        examples, tokens, loss, *rest = self._ranks.total(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / examples / self._mean_length}
        metrics |= {f"{metric_key_prefix}_{name}": x / tokens for name, x in zip(self.figure_names, rest, strict=True)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def target(self, inputs: dict[str, Tensor]) -> Target:
        """What a batch's rows should become."""
        return lambda logp, positions: logp

    def measure(self, target_of: Target, piece: Piece) -> list[Tensor]:
        """The loss and then `figures`, each `[n]`."""
        target = target_of(piece.logp, piece.positions)
        return [distillation(target, piece.logq), *self.figures(target, piece)]

    def figures(self, target: Tensor, piece: Piece) -> list[Tensor]:
        """What `figure_names` names, each `[n]`: in nats, and the chance that the proposal would accept a draft.

        Args:
            target: `[n, V]`.
            piece: the student's rows, and the proposal's.
        """
        assert piece.cached is not None
        even = piece.cached.evenly().rebuild(self._vocab_size)  # KL needs the tokens that were not drawn, see `measure`
        nll = [sft(rows, piece.tokens) for rows in (target, piece.logq)]
        return [*nll, distillation(even, piece.logq), acceptance(even, piece.logq)]
