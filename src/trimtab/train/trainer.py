"""`transformers.Trainer` with our objectives in place of its loss, our batches, and our diagnostics in place of its evaluation.

Losses are sums over an answer's tokens, averaged over examples and divided by the mean length of the training answers: nats per
token, and the same gradient however a batch is cut into micro-batches or spread over processes (`trimtab.train.order`).
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState

from trimtab.core.logprobs import kl_divergence
from trimtab.core.objectives import per_example
from trimtab.data.examples import answers
from trimtab.models.peft_saving import unasked
from trimtab.train.batches import ExampleDataset, answer_logits, cached_batch, kept_of, rows_at
from trimtab.train.diagnostics import measure, summarise
from trimtab.train.objectives import Alone, Batch, Logits, Rows, Setting, TokenLoss
from trimtab.train.order import EpochLoader, Updates, whole_passes
from trimtab.train.pieces import Passes, Piece, Room, pieces, token_counts
from trimtab.train.plan import Plan
from trimtab.train.ranks import ALONE, Ranks
from trimtab.train.rows import CachedRows, TaughtRows
from trimtab.train.taught_rows import taught_batch
from trimtab.train.tune import Look, Losses, tune_weight

__all__ = ["AlignerTrainer", "fit", "trained"]

logger = logging.getLogger(__name__)

MEASURES = 9
"""How many sums `measure` gives."""

LOSSES = 6
"""How many sums `AlignerTrainer.look` gives beside its diagnostics."""

LOADER = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")
"""What `TrainingArguments` says of loaders, as `dataloader_…`; not every version has all."""


class AlignerTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Train an aligner on an `ExampleDataset`.

    Args:
        plan: of the run.
        vocab_size: V.
        mean_length: mean number of tokens in the training answers.
        ranks: the processes that train together.
        arguments: what `transformers.Trainer` takes.
    """

    control: Any

    def __init__(self, plan: Plan, vocab_size: int, mean_length: float, *, ranks: Ranks = ALONE, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our losses are means over examples already
        self._plan, self._vocab_size, self._mean_length, self._ranks = plan, vocab_size, mean_length, ranks
        self._objective, self._setting, self._rule, self._weight = plan.objective, plan.setting, plan.rule, plan.weight
        self._temperature = plan.temperatures.aligner
        self._first = self._objective.token_losses(self._setting)[0]
        self._figures_of = self._objective.figures(self._setting)
        self.measures = MEASURES + len(self._figures_of)
        """How many sums `_measure` gives."""

    @property
    def has_proposal(self) -> bool:
        """Whether what is trained is, without its adapter, the proposal."""
        return self._plan.trains_head

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of a micro-batch, of which the mean over an update's micro-batches is the update's."""
        seen: dict[str, Logits] = {}

        def tokens(loss: TokenLoss, which: str) -> Tensor:
            if which not in seen:
                seen[which] = self._logits(model, inputs, which)
            losses = loss.of_logits(seen[which])
            if which == "chosen" and loss == self._first and self._keeps(inputs):
                return self._keep(model, inputs, seen[which], losses)
            return losses

        batch = Batch(inputs, self._setting, self._mean_length, tokens, training=True)
        loss = (self._objective.loss(batch) * inputs["share"]).sum()
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
            weights=self.train_dataset.weights,
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
        if (most := self._plan.asked.max_kl) is not None:
            weight = self._weight
            if metrics[f"{metric_key_prefix}_kl_aligned_proposal"] > most:
                looks = partial(self.losses_at, eval_dataset)
                weight = tune_weight(self._rule, looks, self._ranks, most, stay=self._plan.stay).weight
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
        setting = self._setting._replace(weight=self._weight if weight is None else weight)
        sums, wanted = torch.zeros(self.measures, dtype=torch.float64), self._objective.token_losses(setting)
        found: dict[tuple[TokenLoss, str], Tensor] = {}
        for which, some in passes:
            values: dict[TokenLoss, list[Tensor]] = {loss: [] for loss in (Alone(), *wanted)}
            for piece in some:
                rows = self._rows(inputs, piece, setting)
                alone = Alone().of_rows(rows)
                for loss, parts in values.items():
                    readable = loss != Alone() and (rows.proposal is not None or not loss.reads_proposal)
                    parts.append(loss.of_rows(rows) if readable else alone)
                if piece.cached is not None and which == "chosen":
                    sums += self._measure(rows, piece.cached, token_counts(inputs, which, piece))
            found |= {(loss, which): torch.cat(parts) for loss, parts in values.items()}
        batch = Batch(inputs, setting, self._mean_length, lambda loss, which: found[loss, which], training=False)
        losses, often = self._objective.loss(batch), inputs["weight"]
        totals = [(losses * often).sum(), often.sum()]
        if (rejected := found.get((Alone(), "rejected"))) is None:
            totals += [losses.new_zeros(())] * 2
        else:
            each = often[inputs["rejected_owner"]]
            totals += [(rejected * each).sum(), each.sum()]
        totals += self._won(inputs, batch, wanted[0])
        return sums, torch.stack([total.double() for total in totals]).cpu()

    def _won(self, inputs: dict[str, Tensor], batch: Batch, first: TokenLoss) -> tuple[Tensor, Tensor]:
        """Which weight of pairs has a higher log P_θ − log P_M of the chosen answer, as TRL counts it, and that of all pairs.

        None where no cache has what the proposal gave both answers; pairs of two equal answers do not count.
        """
        kinds = ("chosen", "rejected")
        if not all(f"{which}_proposal_token_logp" in inputs for which in kinds):
            none = inputs["share"].new_zeros(())
            return none, none
        wanted, unwanted = (batch.gain(batch.tokens(first, which), which) for which in kinds)
        often = inputs["weight"] * batch.differs
        return ((wanted > unwanted) * often).sum(), often.sum()

    def losses_at(self, dataset: Any = None) -> Losses:
        """What `tune_weight` reads of the wanted development answers."""
        for inputs, passes in self.development(dataset):
            for _, some in passes:
                for piece in some:
                    at = partial(self._at, self._rows(inputs, piece, self._setting))
                    yield Look(at, token_counts(inputs, "chosen", piece))

    def _at(self, rows: Rows, weight: float) -> tuple[Tensor, Tensor]:
        setting = self._setting._replace(weight=weight)
        aligned = self._rule.target(rows.logp, [rows.logq], rows.logq.new_tensor([weight]))
        losses = self._objective.tuned(setting).of_rows(rows._replace(setting=setting))
        return losses, kl_divergence(aligned, rows.logp)

    def _rows(self, inputs: Mapping[str, Tensor], piece: Piece, setting: Setting) -> Rows:
        """What a loss sees of a piece."""
        taught = None
        if setting.taught:
            taught = TaughtRows(*(column[piece.part] for column in taught_batch(inputs)))
        return Rows(piece.tokens, piece.logq, None if piece.cached is None else piece.logp, setting, taught)

    def _measure(self, rows: Rows, cached: CachedRows, often: Tensor) -> Tensor:
        """Sums over a piece's tokens `[measures]`, each counted as often as it should be `[n]`."""
        said, logp = self._plan.asked.proposal_top_p, rows.logp
        top_p = said if said is not None and said < 1 else 0.95
        even = cached.evenly().rebuild(self._vocab_size) if cached.samples.shape[-1] else logp
        sums = measure(self._rule, logp, rows.logq, rows.setting.weight, rows.tokens, top_p, even, often)
        more = [(loss.of_rows(rows).double() * often).sum() for loss in self._figures_of.values()]
        return torch.cat([sums, torch.stack(more).cpu()]) if more else sums

    def _summary(self, sums: Tensor) -> dict[str, float]:
        """Means from the sums of all pieces."""
        plain = len(sums) - len(self._figures_of)
        means = (sums[plain:] / sums[0]).tolist()
        return dataclasses.asdict(summarise([sums[:plain]])) | dict(zip(self._figures_of, means, strict=True))

    @property
    def room(self) -> Room:
        """How large training's largest micro-batch is."""
        examples = self.train_dataset.examples
        return Room.of(examples if self._plan.reads_rejected else answers(examples, "chosen"), self._train_batch_size)

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
                bare = self._bare_logits(self.model, inputs, which)[0], self._plan.temperatures.proposal
            elif f"{which}_proposal_ids" in inputs:
                cached = cached_batch(inputs, which)
            tokens = inputs[f"{which}_tokens"]
            yield which, pieces(logits, positions, tokens, cached, self._vocab_size, self._temperature, most, bare)
            del logits, bare

    def _loader(self, dataset: ExampleDataset, batches: Any) -> EpochLoader:
        said = {name: getattr(self.args, f"dataloader_{name}") for name in LOADER if hasattr(self.args, f"dataloader_{name}")}
        return EpochLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, **said)

    def _weigh(self, losses: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """A micro-batch's loss from those of its wanted tokens `[N]`, weighed as an objective's is."""
        each = per_example(losses, inputs["chosen_owner"], len(inputs["chosen_ids"]))
        return (each / self._mean_length * inputs["share"]).sum()

    def _logits(self, model: Any, inputs: dict[str, Tensor], which: str) -> Logits:
        """What a loss sees of the `which` answers in training; the proposal's rows are made, or rebuilt, if it reads them."""
        tokens = inputs[f"{which}_tokens"]
        proposal = partial(self._proposal_rows, inputs, which)
        logits, positions = answer_logits(model, inputs, which)
        return Logits(logits, positions, tokens, self._vocab_size, self._setting, proposal, partial(taught_batch, inputs))

    def _proposal_rows(self, inputs: dict[str, Tensor], which: str) -> CachedRows:
        """On the `which` answers: those of the cache, or a head's own."""
        if not self.has_proposal:
            return cached_batch(inputs, which)
        return self._whole(self._bare_logits(self.model, inputs, which), inputs[f"{which}_tokens"])

    def _whole(self, bare: tuple[Tensor, Tensor], tokens: Tensor) -> CachedRows:
        """The proposal's rows from its `answer_logits`."""
        return CachedRows.whole(rows_at(*bare, self._vocab_size, self._plan.temperatures.proposal), tokens)

    def _keeps(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether some of a batch is to stay as the proposal said it; with FSDP all processes make the same passes."""
        return "kept_rows" in inputs or bool(self._plan.kept_samples and self.is_fsdp_enabled)

    @torch.no_grad()
    def _bare_logits(self, model: Any, inputs: Mapping[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
        """The proposal's `answer_logits`: those of a head's layers without its adapter."""
        alone = self.accelerator.unwrap_model(model)
        with self.compute_loss_context_manager(), alone.disable_adapter():
            return answer_logits(model if self.is_fsdp_enabled else alone, inputs, which)

    def _keep(self, model: Any, inputs: dict[str, Tensor], seen: Logits, losses: Tensor) -> Tensor:
        """Losses `[N]` with KL(proposal‖head) in the place of those of what the proposal said itself."""
        kept, places = kept_of(inputs)
        bare = self._bare_logits(model, kept, "chosen")
        if "kept_rows" not in inputs:
            return losses
        proposal = rows_at(*bare, self._vocab_size)
        head = rows_at(seen.logits, seen.positions[places], self._vocab_size)
        return losses.index_copy(0, places, kl_divergence(proposal, head).to(losses.dtype))


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
