"""`transformers.Trainer` with our objectives in place of its loss, our batches, and our diagnostics in place of its evaluation.

Losses are sums over an answer's tokens, averaged over examples and divided by the mean length of the training answers: nats per
token, and the same gradient however a batch is cut into micro-batches or spread over processes (`trimtab.train.order`).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from trimtab.core.logprobs import kl_divergence
from trimtab.core.objectives import likelihood, per_example, preference, ram, sft
from trimtab.data.examples import answers
from trimtab.models.peft_saving import unasked
from trimtab.train.batches import ExampleDataset, answer_logits, answer_rows, cached_batch, kept_of, rows_at
from trimtab.train.diagnostics import measure, summarise
from trimtab.train.fused_likelihood import fused_likelihood, fused_sft
from trimtab.train.head_options import stay_of
from trimtab.train.options import TrainOptions
from trimtab.train.order import EpochLoader, Updates, whole_passes
from trimtab.train.pieces import Passes, Piece, Room, pieces
from trimtab.train.ranks import ALONE, Ranks
from trimtab.train.rows import CachedRows
from trimtab.train.tune import Losses, tune_weight

__all__ = ["AlignerTrainer"]

LOSSES = 6
"""How many sums `AlignerTrainer.look` gives beside its diagnostics."""

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
    measures = 9
    """How many sums `_measure` gives."""

    def __init__(
        self, options: TrainOptions, vocab_size: int, mean_length: float, *, ranks: Ranks = ALONE, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our losses are means over examples already
        self._options, self._vocab_size, self._mean_length, self._ranks = options, vocab_size, mean_length, ranks
        self._rule, self._weight = options.parsed_rule, options.starting_weight
        self._temperature = options.temperatures.aligner

    @property
    def has_proposal(self) -> bool:
        """Whether what is trained is, without its adapter, the proposal."""
        return self._options.trains_head

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of a micro-batch, of which the mean over an update's micro-batches is the update's."""
        if self._options.objective == "likelihood":
            losses = self._likelihood(model, inputs)
        else:
            kinds = ("chosen", "rejected") if self._options.needs_rejected else ("chosen",)
            tokens = {which: sft(self._rows(model, inputs, which), inputs[f"{which}_tokens"]) for which in kinds}
            losses = self._losses(inputs, tokens)
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
        with unasked():
            super().save_model(output_dir, _internal_call)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and diagnostics on the development data, logged under `eval_…`.

        They are at the weight that is trained at; where that one is beyond `max_kl`, at the best weight within it, for so the
        aligner would be decoded.
        """
        metrics = self._figures(eval_dataset, metric_key_prefix, self._weight)
        if (most := self._options.max_kl) is not None:
            weight = self._weight
            if metrics[f"{metric_key_prefix}_kl_aligned_proposal"] > most:
                looks = partial(self.losses_at, eval_dataset)
                weight = tune_weight(self._rule, looks, self._ranks, most, stay=stay_of(self._options)).weight
                metrics = self._figures(eval_dataset, metric_key_prefix, weight)
            metrics[f"{metric_key_prefix}_weight"] = weight
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _figures(self, dataset: Any, prefix: str, weight: float) -> dict[str, float]:
        sums = torch.zeros(self.measures, dtype=torch.float64)
        losses = torch.zeros(LOSSES, dtype=torch.float64)
        dataset = self.eval_dataset if dataset is None else dataset
        for inputs, passes in self.development(dataset, pairs=all(example.rejected for example in dataset.examples)):
            found = self.look(inputs, passes, weight)
            sums, losses = sums + found[0], losses + found[1]
        sums, losses = self._ranks.total(sums), self._ranks.total(losses)
        metrics = {f"{prefix}_{k}": v for k, v in self._summary(sums).items()}
        metrics[f"{prefix}_loss"] = float(losses[0] / losses[1])
        if losses[3]:
            metrics[f"{prefix}_nll_rejected"] = float(losses[2] / losses[3])
        if losses[5]:
            metrics[f"{prefix}_rewards/accuracies"] = float(losses[4] / losses[5])
        return metrics

    def look(self, inputs: dict[str, Tensor], passes: Passes, weight: float | None = None) -> tuple[Tensor, Tensor]:
        """What `evaluate` adds up of one development batch, at a weight or the trained one.

        Returns:
            Diagnostics `[measures]`, and sums with what to divide them by `[LOSSES]`: of losses, of rejected tokens' ones, and
            of pairs whose implicit reward is higher for the chosen answer.
        """
        weight = self._weight if weight is None else weight
        sums, alone, decoded = torch.zeros(self.measures, dtype=torch.float64), {}, {}
        for which, some in passes:
            values = []
            for piece in some:
                values.append([sft(piece.logq, piece.tokens)] * 2)
                if piece.cached is not None:
                    logp = piece.logp
                    if self._options.objective == "likelihood":
                        values[-1][1] = self._decoded(inputs, piece, logp, weight)
                    if which == "chosen":
                        sums += self._measure(inputs, piece, logp, weight)
            alone[which], decoded[which] = map(torch.cat, zip(*values, strict=True))
        loss = self._losses(inputs, decoded).sum()
        rejected = alone.get("rejected", loss.new_zeros(0))
        losses = [loss, loss.new_tensor(len(inputs["chosen_ids"])), rejected.sum(), loss.new_tensor(len(rejected))]
        return sums, torch.stack([*losses, *self._won(inputs, decoded)]).double().cpu()

    def _won(self, inputs: dict[str, Tensor], decoded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """How many pairs have a higher log P_θ − log P_M of the chosen answer, as TRL counts it, and how many pairs there are.

        None where no cache has what the proposal gave both answers; pairs of two equal answers do not count.
        """
        known = [which for which in decoded if f"{which}_proposal_token_logp" in inputs]
        if len(known) < 2:
            none = decoded["chosen"].new_zeros(())
            return none, none
        wanted, unwanted = (self._gain(inputs, which, decoded[which]) for which in known)
        return ((wanted > unwanted) & inputs["differs"]).sum(), inputs["differs"].sum()

    def losses_at(self, dataset: Any = None) -> Losses:
        """What `tune_weight` reads of the wanted development answers."""
        for inputs, passes in self.development(dataset):
            for _, some in passes:
                for piece in some:
                    yield partial(self._at, inputs, piece, piece.logp)

    def _at(self, inputs: dict[str, Tensor], piece: Piece, logp: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        aligned = self._rule.target(logp, [piece.logq], logp.new_tensor([weight]))
        return self._decoded(inputs, piece, logp, weight), kl_divergence(aligned, logp)

    def _decoded(self, inputs: dict[str, Tensor], piece: Piece, logp: Tensor, weight: float) -> Tensor:
        """`likelihood` of a piece's tokens `[n]` at a weight."""
        return likelihood(self._rule, logp, piece.logq, weight, piece.tokens)

    def _measure(self, inputs: dict[str, Tensor], piece: Piece, logp: Tensor, weight: float) -> Tensor:
        """Sums over a piece's tokens `[measures]`, at a weight."""
        assert piece.cached is not None
        said = self._options.proposal_top_p
        top_p = said if said is not None and said < 1 else 0.95
        even = piece.cached.evenly().rebuild(self._vocab_size) if piece.cached.samples.shape[-1] else logp
        return measure(self._rule, logp, piece.logq, weight, piece.tokens, top_p, even)

    def _summary(self, sums: Tensor) -> dict[str, float]:
        """Means from the sums of all pieces."""
        return dataclasses.asdict(summarise([sums]))

    @property
    def room(self) -> Room:
        """How large training's largest micro-batch is."""
        examples = self.train_dataset.examples
        return Room.of(examples if self._options.needs_rejected else answers(examples, "chosen"), self._train_batch_size)

    def development(self, dataset: Any = None, *, pairs: bool = False) -> Iterator[tuple[dict[str, Tensor], Passes]]:
        """This process's development batches, each with its `passes`, which are run as they are asked for.

        A batch that is another process's too takes part in the computation, which may need all processes, and is not given.
        """
        self.model.eval()
        dataset, ranks = self.eval_dataset if dataset is None else dataset, self._ranks
        room = self.room
        batches, count = whole_passes(room.batches(dataset.examples, self.args.eval_batch_size), ranks.index, ranks.count)
        for number, batch in enumerate(self._loader(dataset, batches)):
            inputs = self._prepare_inputs(batch)
            passes = self.passes(inputs, room.piece, pairs=pairs)
            if number < count:
                yield inputs, passes
            for _, unseen in passes:
                del unseen  # and the logits with it, before the next pass

    @torch.no_grad()
    def passes(self, inputs: dict[str, Tensor], most: int, *, pairs: bool) -> Passes:
        """The wanted answers' rows, and with `pairs` then the unwanted ones', in pieces of `most` rows."""
        for which in ("chosen", "rejected") if pairs else ("chosen",):
            with self.compute_loss_context_manager():
                logits, positions = answer_logits(self.model, inputs, which)
            cached, bare = None, None
            if self.has_proposal:
                bare = self._bare_logits(self.model, inputs, which)[0], self._options.temperatures.proposal
            elif f"{which}_proposal_ids" in inputs:
                cached = cached_batch(inputs, which)
            tokens = inputs[f"{which}_tokens"]
            yield which, pieces(logits, positions, tokens, cached, self._vocab_size, self._temperature, most, bare)
            del logits, bare

    def _loader(self, dataset: ExampleDataset, batches: Any) -> EpochLoader:
        said = {name: getattr(self.args, f"dataloader_{name}") for name in LOADER if hasattr(self.args, f"dataloader_{name}")}
        return EpochLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, **said)

    def _likelihood(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """What `_losses` says of `likelihood`, from logits and compressed rows; and the regulariser, which evaluation lacks."""
        options = self._options
        kinds = ("chosen", "rejected") if options.contrast else ("chosen",)
        found = {which: answer_logits(model, inputs, which) for which in kinds}
        losses = {which: self._fused(inputs, which, *logits) for which, logits in found.items()}
        if "kept_rows" in inputs or (options.kept_samples and self.is_fsdp_enabled):  # where all processes make the same passes
            losses["chosen"] = self._keep(model, inputs, *found["chosen"], losses["chosen"])
        loss = self._contrasted(inputs, losses)
        if options.regulariser:
            alone = fused_sft(*found["chosen"], inputs["chosen_tokens"], self._vocab_size)
            loss = loss + options.regulariser * self._sum(alone, inputs, "chosen") / self._mean_length
        return loss

    def _fused(self, inputs: dict[str, Tensor], which: str, logits: Tensor, positions: Tensor) -> Tensor:
        """The loss of each token of the `which` answers `[N]`."""
        if self._options.is_plain:
            return fused_sft(logits, positions, inputs[f"{which}_tokens"], self._vocab_size)
        tokens, how = inputs[f"{which}_tokens"], (self._weight, self._temperature, self._vocab_size)
        if self.has_proposal:
            rows = rows_at(*self._bare_logits(self.model, inputs, which), self._vocab_size, self._options.temperatures.proposal)
            return fused_likelihood(self._rule, CachedRows.whole(rows, tokens), logits, positions, *how)
        return fused_likelihood(self._rule, cached_batch(inputs, which), logits, positions, *how)

    @torch.no_grad()
    def _bare_logits(self, model: Any, inputs: Mapping[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
        """The proposal's `answer_logits`: those of a head's layers without its adapter."""
        alone = self.accelerator.unwrap_model(model)
        with self.compute_loss_context_manager(), alone.disable_adapter():
            return answer_logits(model if self.is_fsdp_enabled else alone, inputs, which)

    def _keep(self, model: Any, inputs: dict[str, Tensor], logits: Tensor, positions: Tensor, losses: Tensor) -> Tensor:
        """Losses `[N]` with KL(proposal‖head) in the place of those of what the proposal said itself."""
        kept, places = kept_of(inputs)
        bare = self._bare_logits(model, kept, "chosen")
        if "kept_rows" not in inputs:
            return losses
        proposal = rows_at(*bare, self._vocab_size)
        head = rows_at(logits, positions[places], self._vocab_size)
        return losses.index_copy(0, places, kl_divergence(proposal, head).to(losses.dtype))

    def _contrasted(self, inputs: dict[str, Tensor], losses: dict[str, Tensor]) -> Tensor:
        """`likelihood` and what `contrast` adds to it `[B]`, from each token's −log-probability as it is decoded.

        A pair of two equal answers has no contrast.
        """
        loss = self._sum(losses["chosen"], inputs, "chosen") / self._mean_length
        if not self._options.contrast:
            return loss
        gains = {}  # log P_θ − log p̃ in nats a token: sums would be won by length
        for which in ("chosen", "rejected"):
            lengths = self._sum(torch.ones_like(losses[which]), inputs, which)
            gains[which] = self._gain(inputs, which, losses[which]) / lengths
        contrast = preference(gains["chosen"], gains["rejected"], self._options.inverse_temperature)
        return loss + self._options.contrast * torch.where(inputs["differs"], contrast, 0.0)

    def _losses(self, inputs: dict[str, Tensor], tokens: dict[str, Tensor]) -> Tensor:
        """One loss for each example `[B]`, from −log-probabilities of its answers' tokens `[N]`.

        For `likelihood` those are as decoded, otherwise the aligner's alone; unwanted answers may be there without being used.
        """
        o = self._options
        if o.objective == "likelihood":
            return self._contrasted(inputs, tokens)
        if o.has_reference:
            wanted, unwanted = (self._gain(inputs, which, tokens[which]) for which in ("chosen", "rejected"))
            return preference(wanted, unwanted, o.inverse_temperature)
        chosen = self._sum(tokens["chosen"], inputs, "chosen")
        if not o.needs_rejected:
            return chosen / self._mean_length
        rejected = self._sum(tokens["rejected"], inputs, "rejected")
        if o.objective == "ram":
            return ram(-chosen, -rejected, o.alpha) / self._mean_length
        return preference(-chosen, -rejected, o.inverse_temperature)

    def _gain(self, inputs: dict[str, Tensor], which: str, losses: Tensor) -> Tensor:
        """By how much the `which` answers' log-probabilities `[B]` are above the proposal's, from each token's negative one."""
        return -self._sum(losses + cached_batch(inputs, which).token_logp, inputs, which)

    def _rows(self, model: Any, inputs: dict[str, Tensor], which: str) -> Tensor:
        """Log q at the decoding temperature `[N, V]`."""
        return answer_rows(model, inputs, which, self._vocab_size, self._temperature)

    def _sum(self, values: Tensor, inputs: dict[str, Tensor], which: str) -> Tensor:
        return per_example(values, inputs[f"{which}_owner"], len(inputs[f"{which}_ids"]))
