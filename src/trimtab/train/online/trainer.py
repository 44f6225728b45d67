"""The trainer of rewards: each update is on a round of samples of its own, drawn from what is trained as it is then."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data.examples import Example
from trimtab.train.batches import Item, answer_logits, collate
from trimtab.train.objectives import Batch, Gained, TokenLoss
from trimtab.train.online.betas import Betas
from trimtab.train.online.figures import figures_of
from trimtab.train.online.policy import Policies
from trimtab.train.online.rounds import Prompt, Rounds, Sample
from trimtab.train.plan import Plan
from trimtab.train.rows import CachedRows
from trimtab.train.trainer import AlignerTrainer

__all__ = ["OnlineTrainer"]

logger = logging.getLogger(__name__)


class OnlineTrainer(AlignerTrainer):
    """Train an aligner on rounds.

    Args:
        plan: of the run.
        vocab_size: V.
        proposal: the transformers model of P_M, whose rows are made as they are wanted.
        policies: makes what samples are drawn from.
        rounds: draws, scores and keeps them.
        prompts, development: what they are of.
        betas: β of each round.
        arguments: what `transformers.Trainer` takes.
    """

    def __init__(
        self,
        plan: Plan,
        vocab_size: int,
        *,
        proposal: Any,
        policies: Policies,
        rounds: Rounds,
        prompts: Sequence[Prompt],
        development: Sequence[Prompt],
        betas: Betas,
        **arguments: Any,
    ) -> None:
        super().__init__(plan, vocab_size, 1.0, data_collator=collate, **arguments)
        self._frozen, self._policies, self._rounds, self._betas = proposal, policies, rounds, betas
        self._prompts, self._development = prompts, development
        self._said: dict[str, float] = {}

    def get_train_dataloader(self) -> Any:
        """Micro-batches of the rounds that are left."""
        return _Loader(self)

    def micro_batches(self) -> Iterator[dict[str, Any]]:
        """Those of one update after another; a round is drawn when its update is due."""
        for number in range(self.state.global_step, self.state.max_steps):
            samples = self._rounds.read(number)
            if samples is None:
                samples = self._rounds.draw(number, self._policies.of(self._bare_model), gains=self._betas.budget is not None)
            beta = self._betas.at(number, lambda one: self._rounds.read(one) or [])
            groups = self._rounds.groups(number, samples)
            self._said = {"reward": _mean([s.score for s in samples if s.score is not None]), "beta": beta}
            self._said["length"] = _mean([len(sample.tokens) for sample in samples])
            yield from self._packed(groups, self._prompts, beta, self.updates)

    @property
    def updates(self) -> int:
        """Micro-batches of an update."""
        return int(self.args.gradient_accumulation_steps)

    @property
    def best_step(self) -> int:
        """The step whose weights count at the end."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return int(self.state.global_step if best is None else best)

    @property
    def _bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What a round was like beside its loss."""
        super().log(logs | (self._said if "loss" in logs else {}), *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Reward and divergence of samples of the development prompts, as logged under `eval_…`."""
        self.model.eval()
        step = self.state.global_step if self.is_in_train else self.best_step
        samples = self._rounds.look(f"{step:06d}", self._policies.of(self._bare_model))
        last = max(0, self.state.global_step - 1)
        final = self._betas.at(last, lambda one: self._rounds.read(one) or []) if self._betas.budget else self._betas.beta
        beta = float(final or 0.0)
        groups = [[sample for sample in samples if sample.place == place] for place in range(len(self._development))]
        losses, gains = torch.zeros(0), torch.zeros(0)
        for packed in self._packed(groups, self._development, beta, len(groups)):
            batch = self._prepare_inputs(packed)
            found = self._losses_and_gains(batch)
            counted = batch["share"] > 0
            losses, gains = (
                torch.cat([all_of, some[counted].float().cpu()]) for all_of, some in zip((losses, gains), found, strict=True)
            )
        figures = figures_of(samples, float(gains.mean()), beta, self._betas.budget)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_loss"] = float(losses.mean())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _losses_and_gains(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found: dict[TokenLoss, Tensor] = {}

        def tokens(loss: TokenLoss, which: str) -> Tensor:
            if loss not in found:
                with self.compute_loss_context_manager():
                    found[loss] = loss.of_logits(self._logits(self.model, inputs, which))
            return found[loss]

        batch = Batch(inputs, self._setting, self._mean_length, tokens, training=False)
        return self._objective.loss(batch), batch.sum(batch.tokens(Gained()))

    def _packed(
        self, groups: Sequence[Sequence[Sample]], prompts: Sequence[Prompt], beta: float, wanted: int
    ) -> Iterator[dict[str, Any]]:
        """So many micro-batches: whole groups, of which what has no score is left out; some may have nothing that counts."""
        scored = [[sample for sample in group if sample.score is not None] for group in groups]
        kept = sorted((some for some in scored if len(some) > 1), key=lambda some: -max(len(s.tokens) for s in some))
        count = sum(map(len, kept))
        self._mean_length = sum(len(sample.tokens) for some in kept for sample in some) / max(count, 1) or 1.0
        parts = [kept[i * len(kept) // wanted : (i + 1) * len(kept) // wanted] for i in range(wanted)]
        filler = [[next(sample for group in groups for sample in group)]]
        for part in parts:
            chosen = [(slot, sample) for slot, some in enumerate(part or filler) for sample in some]
            share = wanted / count if part else 0.0
            items = [Item(Example(prompts[s.place].ids, s.tokens, ()), share=share) for _, s in chosen]
            batch = collate(items)
            batch["group"] = torch.tensor([slot for slot, _ in chosen])
            batch["reward"] = torch.tensor([sample.score or 0.0 for _, sample in chosen])
            batch["beta"] = torch.full((len(chosen),), beta)
            yield batch

    def _proposal_rows(self, inputs: dict[str, Tensor], which: str) -> CachedRows:
        """Made as they are wanted, with every entry."""
        if self.has_proposal:
            return super()._proposal_rows(inputs, which)
        with torch.no_grad(), self.compute_loss_context_manager():
            bare = answer_logits(self._frozen, inputs, which)
        return self._whole(bare, inputs[f"{which}_tokens"])


class _Loader:
    """What a trainer takes for a data loader: it is asked for one micro-batch after another."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return int(self._trainer.args.max_steps) * self._trainer.updates

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._trainer.micro_batches()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
