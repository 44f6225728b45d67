"""`transformers.Trainer` with our objectives in place of its loss, our batches, and our diagnostics in place of its evaluation.

Losses are sums over an answer's tokens, averaged over examples and divided by the mean length of the training answers: nats per
token, and the same gradient however a batch is cut into micro-batches or spread over processes (`trimtab.train.order`).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from trimtab.core.logprobs import Warp, warp
from trimtab.core.objectives import likelihood, per_example, preference, ram, sft
from trimtab.train.batches import ExampleDataset, answer_logits, answer_rows, cached_batch, cached_rows
from trimtab.train.diagnostics import measure, summarise
from trimtab.train.fused_likelihood import fused_likelihood, fused_sft
from trimtab.train.options import TrainOptions
from trimtab.train.order import EpochLoader, Updates, whole_passes
from trimtab.train.ranks import ALONE, Ranks

__all__ = ["AlignerTrainer"]

LOADER = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")
"""What `TrainingArguments` says of loaders, as `dataloader_…`; not every version has all."""


class AlignerTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Train an aligner on an `ExampleDataset`.

    Args:
        options: objective, rule and their settings.
        vocab_size: V.
        mean_length: mean number of tokens in the training answers.
        ranks: the processes that train together.
        arguments: what `transformers.Trainer` takes.
    """

    control: Any

    def __init__(
        self, options: TrainOptions, vocab_size: int, mean_length: float, *, ranks: Ranks = ALONE, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our losses are means over examples already
        self._options, self._vocab_size, self._mean_length, self._ranks = options, vocab_size, mean_length, ranks
        self._rule, self._weight = options.parsed_rule, options.starting_weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of a micro-batch, of which the mean over an update's micro-batches is the update's."""
        if self._options.objective == "likelihood":
            losses = self._likelihood(model, inputs)
        else:
            other = self._rows(model, inputs, "rejected") if self._options.needs_rejected else None
            losses = self._losses(inputs, self._rows(model, inputs, "chosen"), other)
        loss = (losses * inputs["share"]).sum()
        return (loss, {}) if return_outputs else loss

    def get_train_dataloader(self) -> EpochLoader:
        """The same updates for any number of processes."""
        args = self.args
        batches = Updates(
            self.train_dataset.lengths,
            batch_size=self._train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rank=self._ranks.index,
            ranks=self._ranks.count,
            seed=args.seed if args.data_seed is None else args.data_seed,
            strategy=args.train_sampling_strategy,
            drop_last=args.dataloader_drop_last,
        )
        return self._loader(self.train_dataset, batches)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the folder first: where FSDP saves shards, processes that look for it too early disagree which one is best."""
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and diagnostics on the development data, logged under `eval_…`."""
        sums = torch.zeros(9, dtype=torch.float64)
        losses = torch.zeros(4, dtype=torch.float64)  # their sum, over so many examples; of rejected tokens, over so many
        for batch, logp, logq, other in self.development_rows(eval_dataset):
            found = self.look(batch, logp, logq, other)
            sums, losses = sums + found[0].cpu(), losses + found[1].cpu()
        sums, losses = self._ranks.total(sums), self._ranks.total(losses)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in dataclasses.asdict(summarise([sums])).items()}
        metrics[f"{metric_key_prefix}_loss"] = float(losses[0] / losses[1])
        if losses[3]:
            metrics[f"{metric_key_prefix}_nll_rejected"] = float(losses[2] / losses[3])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def look(self, batch: dict[str, Tensor], logp: Tensor, logq: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `evaluate` adds up of one development batch, from its `development_rows`: diagnostics `[9]` and losses `[4]`."""
        rejected = logq.new_zeros(0) if other is None else sft(other, batch["rejected_tokens"])
        loss = self._losses(batch, logq, other).sum()
        losses = [loss, loss.new_tensor(len(batch["chosen_ids"])), rejected.sum(), loss.new_tensor(len(rejected))]
        return self._measure(batch, logp, logq), torch.stack(losses).double()

    def _measure(self, batch: dict[str, Tensor], logp: Tensor, logq: Tensor) -> Tensor:
        said = self._options.proposal_top_p
        top_p = said if said is not None and said < 1 else 0.95
        cached = cached_batch(batch)
        even = cached.evenly().rebuild(self._vocab_size) if cached.samples.shape[-1] else logp
        return measure(self._rule, logp, logq, self._weight, batch["chosen_tokens"], top_p, even)

    @torch.no_grad()
    def development_rows(self, dataset: Any = None) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]]:
        """This process's development batches, each with log p̃ and log q `[N, V]` on its wanted answers.

        And with log q on the unwanted ones, where every example has one. A batch that is another process's too takes part in
        the computation, which may need all processes, and is not given.
        """
        self.model.eval()
        dataset = self.eval_dataset if dataset is None else dataset
        ranks, pairs = self._ranks, all(example.rejected for example in dataset.examples)
        batches, count = whole_passes(dataset.lengths, self.args.eval_batch_size, ranks.index, ranks.count)
        for number, batch in enumerate(self._loader(dataset, batches)):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                logq = self._rows(self.model, inputs, "chosen")
                other = self._rows(self.model, inputs, "rejected") if pairs else None
            if number < count:
                yield inputs, cached_rows(inputs, self._vocab_size), logq, other

    def _loader(self, dataset: ExampleDataset, batches: Any) -> EpochLoader:
        said = {name: getattr(self.args, f"dataloader_{name}") for name in LOADER if hasattr(self.args, f"dataloader_{name}")}
        return EpochLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, **said)

    def _likelihood(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """What `_losses` says of `likelihood`, from logits and compressed rows; and the regulariser, which evaluation lacks."""
        options = self._options
        kinds = ("chosen", "rejected") if options.contrast else ("chosen",)
        found = {which: answer_logits(model, inputs, which) for which in kinds}
        losses = {
            which: fused_likelihood(
                self._rule,
                cached_batch(inputs, which),
                logits,
                positions,
                self._weight,
                options.temperatures.aligner,
                self._vocab_size,
            )
            for which, (logits, positions) in found.items()
        }
        loss = self._contrasted(inputs, losses)
        if options.regulariser:
            alone = fused_sft(*found["chosen"], inputs["chosen_tokens"], self._vocab_size)
            loss = loss + options.regulariser * self._sum(alone, inputs, "chosen") / self._mean_length
        return loss

    def _contrasted(self, inputs: dict[str, Tensor], losses: dict[str, Tensor]) -> Tensor:
        """`likelihood` and what `contrast` adds to it `[B]`, from each token's −log-probability as it is decoded."""
        loss = self._sum(losses["chosen"], inputs, "chosen") / self._mean_length
        if not self._options.contrast:
            return loss
        gains = {}  # log P_θ − log p̃ in nats a token: sums would be won by length
        for which, values in losses.items():
            lengths = self._sum(torch.ones_like(values), inputs, which)
            gains[which] = -self._sum(values + cached_batch(inputs, which).token_logp, inputs, which) / lengths
        contrast = preference(gains["chosen"], gains["rejected"], self._options.inverse_temperature)
        return loss + self._options.contrast * contrast

    def _losses(self, inputs: dict[str, Tensor], rows: Tensor, other: Tensor | None) -> Tensor:
        """One loss for each example `[B]`, from log q on wanted and unwanted answers."""
        o = self._options
        tokens = inputs["chosen_tokens"]
        if o.objective == "likelihood":
            both = {"chosen": rows} if other is None or not o.contrast else {"chosen": rows, "rejected": other}
            losses = {
                which: likelihood(
                    self._rule, cached_rows(inputs, self._vocab_size, which), logq, self._weight, inputs[f"{which}_tokens"]
                )
                for which, logq in both.items()
            }
            return self._contrasted(inputs, losses)
        chosen = self._sum(sft(rows, tokens), inputs, "chosen")
        if not o.needs_rejected or other is None:
            return chosen / self._mean_length
        rejected = self._sum(sft(other, inputs["rejected_tokens"]), inputs, "rejected")
        if o.objective == "ram":
            return ram(-chosen, -rejected, o.alpha) / self._mean_length
        return preference(-chosen, -rejected, o.inverse_temperature)

    def _rows(self, model: Any, inputs: dict[str, Tensor], which: str) -> Tensor:
        """Log q at the decoding temperature `[N, V]`."""
        rows = answer_rows(model, inputs, which, self._vocab_size)
        temperature = self._options.temperatures.aligner
        return rows if temperature == 1 else warp(rows, Warp(temperature))

    def _sum(self, values: Tensor, inputs: dict[str, Tensor], which: str) -> Tensor:
        return per_example(values, inputs[f"{which}_owner"], len(inputs[f"{which}_ids"]))
