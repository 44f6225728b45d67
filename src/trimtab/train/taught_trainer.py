"""Train on a teacher's rows in place of wanted tokens: what the proposal says behind another prompt."""

import torch
from torch import Tensor

from trimtab.core.objectives import sampled_distillation
from trimtab.train.fused_likelihood import fused_distillation
from trimtab.train.options import TrainOptions
from trimtab.train.pieces import Piece
from trimtab.train.rows import TaughtRows
from trimtab.train.taught_rows import taught_batch
from trimtab.train.trainer import AlignerTrainer

__all__ = ["TaughtTrainer", "trainer_of"]


def trainer_of(options: TrainOptions) -> type[AlignerTrainer]:
    """Who trains the aligner."""
    return TaughtTrainer if options.teacher_prompt else AlignerTrainer


class TaughtTrainer(AlignerTrainer):
    """Minimise KL(teacher‖aligned) on an `ExampleDataset` with cached rows of both, `teacher`."""

    measures = AlignerTrainer.measures + 3

    def _fused(self, inputs: dict[str, Tensor], which: str, logits: Tensor, positions: Tensor) -> Tensor:
        how = self._weight, self._temperature, self._vocab_size
        return fused_distillation(self._rule, taught_batch(inputs), logits, positions, *how)

    def _decoded(self, inputs: dict[str, Tensor], piece: Piece, logp: Tensor, weight: float) -> Tensor:
        some, rows = _part(inputs, piece), torch.arange(len(piece.tokens), device=piece.logq.device)
        return fused_distillation(self._rule, some, piece.logq, rows, weight, 1.0, self._vocab_size)

    def _measure(self, inputs: dict[str, Tensor], piece: Piece, logp: Tensor, weight: float) -> Tensor:
        """And the divergences of the aligned model and of the proposal from the teacher, and the teacher's own NLL."""
        some = _part(inputs, piece)
        columns = [
            self._decoded(inputs, piece, logp, weight),
            sampled_distillation(some.logt, some.logp, some.logc),
            -some.logt[:, 0],  # the answer's token is the first entry
        ]
        more = torch.stack([column.double().sum() for column in columns]).cpu()
        return torch.cat([super()._measure(inputs, piece, logp, weight), more])

    def _summary(self, sums: Tensor) -> dict[str, float]:
        names = ("kl_teacher_aligned", "kl_teacher_proposal", "nll_teacher")
        means = (sums[-3:] / sums[0]).tolist()
        return super()._summary(sums[:-3]) | dict(zip(names, means, strict=True))


def _part(inputs: dict[str, Tensor], piece: Piece) -> TaughtRows:
    """The rows of a piece's tokens."""
    return TaughtRows(*(column[piece.part] for column in taught_batch(inputs)))
