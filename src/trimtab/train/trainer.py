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

from trimtab.core.logprobs import Warp, warp
from trimtab.core.objectives import likelihood, per_example, preference, ram, sft
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
            sums.append(measure(self._rule, logp, logq, self._weight, batch["chosen_tokens"], top_p))
            with torch.no_grad():
                losses += float(self._losses(self.model, batch).sum())
                examples += len(batch["chosen_ids"])
                if "rejected_tokens" in batch:
                    nll = sft(answer_rows(self.model, batch, "rejected", self._vocab_size), batch["rejected_tokens"])
                    rejected += torch.tensor([float(nll.sum()), len(nll)], dtype=torch.float64)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in dataclasses.asdict(summarise(sums)).items()}
        metrics[f"{metric_key_prefix}_loss"] = losses / examples
        if rejected[1]:
            metrics[f"{metric_key_prefix}_nll_rejected"] = float(rejected[0] / rejected[1])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def development_rows(self, dataset: Any = None) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Each development batch with log p̃ and log q `[N, V]` on its wanted answers."""
        self.model.eval()
        for batch in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                logq = self._rows(self.model, inputs, "chosen")
            yield inputs, cached_rows(inputs, self._vocab_size), logq

    def _losses(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """One loss for each example `[B]`."""
        o = self._options
        rows, tokens = self._rows(model, inputs, "chosen"), inputs["chosen_tokens"]
        if o.objective == "likelihood":
            losses = likelihood(self._rule, cached_rows(inputs, self._vocab_size), rows, self._weight, tokens)
            return self._sum(losses, inputs, "chosen") / self._mean_length
        chosen = self._sum(sft(rows, tokens), inputs, "chosen")
        if o.objective == "sft" or (o.objective == "ram" and o.alpha == 0):
            return chosen / self._mean_length
        other = sft(self._rows(model, inputs, "rejected"), inputs["rejected_tokens"])
        rejected = self._sum(other, inputs, "rejected")
        if o.objective == "ram":
            return ram(-chosen, -rejected, o.alpha) / self._mean_length
        return preference(-chosen, -rejected, o.beta)

    def _rows(self, model: Any, inputs: dict[str, Tensor], which: str) -> Tensor:
        """Log q at the decoding temperature `[N, V]`."""
        return warp(answer_rows(model, inputs, which, self._vocab_size), Warp(self._options.aligner_temperature))

    def _sum(self, values: Tensor, inputs: dict[str, Tensor], which: str) -> Tensor:
        return per_example(values, inputs[f"{which}_owner"], len(inputs[f"{which}_ids"]))
