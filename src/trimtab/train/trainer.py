"""`transformers.Trainer` with our objectives in place of its loss, and our diagnostics in place of its evaluation.

Losses are sums over an answer's tokens, averaged over examples and divided by the mean length of the training answers: nats per
token, and the same gradient however a batch is cut into micro-batches or spread over processes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from trimtab.core.logprobs import Warp, gather, warp
from trimtab.core.objectives import likelihood, preference, ram, sequence_logprob, sft
from trimtab.train.batches import answer_rows, cached_rows
from trimtab.train.diagnostics import measure, summarise
from trimtab.train.options import TrainOptions

__all__ = ["AlignerTrainer"]


class AlignerTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Train an aligner on an `ExampleDataset`.

    Args:
        options: objective, rule and their settings.
        vocab_size: V.
        mean_length: mean number of tokens in the training answers.
        arguments: what `transformers.Trainer` takes.
    """

    control: Any

    def __init__(self, options: TrainOptions, vocab_size: int, mean_length: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our losses are means over examples already
        self._options, self._vocab_size, self._mean_length = options, vocab_size, mean_length
        self._rule, self._weight = options.parsed_rule, options.starting_weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of a batch."""
        loss = self._losses(model, inputs).mean()
        return (loss, {}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and diagnostics on the development data, logged under `eval_…`."""
        self.model.eval()
        sums, losses, rejected, examples = [], 0.0, torch.zeros(2, dtype=torch.float64), 0
        for batch, logp, logq in self.development_rows(eval_dataset):
            top_p = self._options.proposal_top_p if self._options.proposal_top_p < 1 else 0.95
            mask = batch["chosen_mask"]
            sums.append(measure(self._rule, logp, logq, self._weight, batch["chosen_tokens"], mask, top_p))
            with torch.no_grad():
                losses += float(self._losses(self.model, batch).sum())
                examples += len(mask)
                if "rejected_tokens" in batch:
                    rejected += self._rejected(batch).cpu()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in dataclasses.asdict(summarise(sums)).items()}
        metrics[f"{metric_key_prefix}_loss"] = losses / examples
        if rejected[1]:
            metrics[f"{metric_key_prefix}_nll_rejected"] = float(rejected[0] / rejected[1])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def development_rows(self, dataset: Any = None) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Each development batch with log p̃ and log q `[B, T, V]` on its wanted answers."""
        self.model.eval()
        for batch in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                logq = self._warped(answer_rows(self.model, inputs, "chosen", self._vocab_size))
            yield inputs, cached_rows(inputs, self._vocab_size), logq

    def _losses(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """One loss for each example `[B]`."""
        o = self._options
        rows = self._warped(answer_rows(model, inputs, "chosen", self._vocab_size))
        tokens, mask = inputs["chosen_tokens"], inputs["chosen_mask"]
        if o.objective == "likelihood":
            logp = cached_rows(inputs, self._vocab_size)
            return likelihood(self._rule, logp, rows, self._weight, tokens, mask) / self._mean_length
        chosen = gather(rows, tokens)
        if o.objective == "sft" or (o.objective == "ram" and o.alpha == 0):
            return sft(chosen, mask) / self._mean_length
        other = self._warped(answer_rows(model, inputs, "rejected", self._vocab_size))
        rejected = sequence_logprob(gather(other, inputs["rejected_tokens"]), inputs["rejected_mask"])
        if o.objective == "ram":
            return ram(sequence_logprob(chosen, mask), rejected, o.alpha) / self._mean_length
        return preference(sequence_logprob(chosen, mask), rejected, o.beta)

    def _rejected(self, batch: dict[str, Tensor]) -> Tensor:
        """Negative log-likelihood of the rejected answers under the aligner, and their number of tokens."""
        rows = answer_rows(self.model, batch, "rejected", self._vocab_size)
        nll = sft(gather(rows, batch["rejected_tokens"]), batch["rejected_mask"]).sum()
        return torch.stack([nll, batch["rejected_mask"].sum()]).double()

    def _warped(self, logq: Tensor) -> Tensor:
        return warp(logq, Warp(self._options.aligner_temperature))
