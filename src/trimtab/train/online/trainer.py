"""The trainer of rewards: each update is on a round of samples of its own, drawn from what is trained as it is then."""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trimtab.data.examples import Example
from trimtab.train.batches import Item, answer_logits, collate
from trimtab.train.objectives import Batch, Gained, Logits, Setting, TokenLoss
from trimtab.train.online.betas import Betas
from trimtab.train.online.figures import check_spread, figures_of, said_of
from trimtab.train.online.packing import can_pack, pack
from trimtab.train.online.policy import Policies
from trimtab.train.online.rounds import Rounds
from trimtab.train.online.samples import Prompt, Sample
from trimtab.train.plan import Plan
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
        tap: the layer whose inputs a head reads; 0 for what reads tokens.
        end: what is put behind everything that a sample begins with; None where nobody asks.
        before: the reward of the proposal's answers to the development prompts.
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
        tap: int,
        end: int | None,
        before: float,
        **arguments: Any,
    ) -> None:
        super().__init__(plan, vocab_size, 1.0, data_collator=collate, **arguments)
        self._setting = self._setting._replace(end=end)
        self._frozen, self._policies, self._rounds, self._betas = proposal, policies, rounds, betas
        self._prompts, self._development, self._tap = prompts, development, tap
        self._passing, self._began = 0.0, time.monotonic() - sum(rounds.seconds.values())  # the proposal has been looked at
        self._before, self._said = before, dict[str, float]()

    def get_train_dataloader(self) -> Any:
        """Micro-batches of the rounds that are left."""
        return _Loader(self)

    def micro_batches(self) -> Iterator[dict[str, Any]]:
        """Those of one update after another; a round is drawn when its update is due."""
        for number in range(self.state.global_step, self.state.max_steps):
            samples = self._rounds.read(number)
            if samples is None:
                policy = self._policies.of(self._bare_model, self._weight)
                samples = self._rounds.draw(number, policy, gains=self._betas.budget is not None)
            beta = self._betas.at(number, self._read)
            groups = self._rounds.groups(number, samples)
            if self._objective.budgeted:  # whose rewards count in units of β
                check_spread(groups, beta)
            self._said = said_of(samples or [sample for group in groups for sample in group], beta)
            scored = [[sample for sample in group if sample.score is not None] for group in groups]
            yield from self._packed([some for some in scored if len(some) > 1], groups, self._prompts, beta, self.updates)

    @property
    def updates(self) -> int:
        """Micro-batches of an update."""
        return int(self.args.gradient_accumulation_steps)

    @property
    def best_step(self) -> int:
        """The step whose weights count at the end."""
        kept = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return int(self.state.best_global_step if kept else self.state.global_step)

    @property
    def _bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def profile(self) -> dict[str, float]:
        """Seconds of this process since it began to train: for sampling, for rewards, in training's passes, and all others."""
        spent = {**self._rounds.seconds, "passes": self._passing}
        return spent | {"other": time.monotonic() - self._began - sum(spent.values())}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch forth and back, on the clock."""
        began = time.monotonic()
        loss: Tensor = super().training_step(*args, **kwargs)
        self._passing += time.monotonic() - began
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What a round was like beside its loss."""
        super().log(logs | (self._said if "loss" in logs else {}), *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Reward and divergence of samples of the development prompts, as logged under `eval_…`."""
        step = self.state.global_step if self.is_in_train else self.best_step
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.figures(f"{step:06d}", self._weight).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def figures(self, name: str, weight: float) -> dict[str, float]:
        """Figures of samples of the development prompts at a weight of the rule; the samples are kept by the name."""
        self.model.eval()
        samples = self._rounds.look(name, self._policies.of(self._bare_model, weight))
        beta = self._betas.last(self.state.global_step, self._read)
        groups = [[sample for sample in samples if sample.place == place] for place in range(len(self._development))]
        losses, gains = self._measured(groups, beta, weight)
        if filed := self._rounds.filed_development:
            losses, _ = self._measured(filed, beta, weight)
        loss = sum(losses) / len(losses) if losses else 0.0
        return figures_of(samples, sum(gains) / len(gains), beta, self._betas.budget, self._before, loss)

    def _measured(self, groups: Sequence[Sequence[Sample]], beta: float, weight: float) -> tuple[list[float], list[float]]:
        """Of samples to development prompts the losses, where they have scores, and the gains."""
        losses: list[float] = []
        gains: list[float] = []
        for packed in self._packed(groups, groups, self._development, beta, len(groups)):
            batch, began = self._prepare_inputs(packed), time.monotonic()
            some_losses, some_gains = self._losses_and_gains(batch, self._setting._replace(weight=weight))
            self._passing += time.monotonic() - began
            gains += some_gains.tolist()
            losses += some_losses[~batch["unscored"]].tolist()
        return losses, gains

    def _read(self, number: int) -> list[Sample]:
        return self._rounds.read(number) or []

    @torch.no_grad()
    def _losses_and_gains(self, inputs: dict[str, Tensor], setting: Setting) -> tuple[Tensor, Tensor]:
        with self.compute_loss_context_manager():
            logits = self._logits(self.model, inputs, "chosen")._replace(setting=setting)

        def tokens(loss: TokenLoss, which: str) -> Tensor:
            return loss.of_logits(logits)

        batch = Batch(inputs, setting, self._mean_length, tokens, training=False)
        return self._objective.loss(batch), batch.sum(batch.tokens(Gained()))

    def _packed(
        self,
        kept: Sequence[Sequence[Sample]],
        groups: Sequence[Sequence[Sample]],
        prompts: Sequence[Prompt],
        beta: float,
        wanted: int,
    ) -> Iterator[dict[str, Any]]:
        """So many micro-batches of the kept groups, whole; where there are too few, one sample of `groups` that counts nothing.

        A sample without a score, of which only looks have some, is compared with none.
        """
        ranked = sorted(kept, key=lambda some: -max(len(sample.tokens) for sample in some))
        count = sum(map(len, ranked))
        self._mean_length = sum(len(sample.tokens) for some in ranked for sample in some) / max(count, 1) or 1.0
        parts = [ranked[i * len(ranked) // wanted : (i + 1) * len(ranked) // wanted] for i in range(wanted)]
        filler = [[next(sample for group in groups for sample in group)]]
        for counted in parts:
            part = counted or filler
            share = wanted / count if counted else 0.0
            samples = [sample for some in part for sample in some]
            examples = [[Example(prompts[s.place].ids, s.tokens, ()) for s in some] for some in part]
            weights = {"share": torch.full((len(samples),), share), "beta": torch.full((len(samples),), beta)}
            yield self._collated(examples) | _compared(part) | weights

    def _collated(self, groups: Sequence[Sequence[Example]]) -> dict[str, Any]:
        """The examples of some groups as tensors, with one reading of each prompt where the model can do that."""
        examples, began = [example for group in groups for example in group], time.monotonic()
        hidden = self._policies.hidden(examples, self._tap)
        self._passing += time.monotonic() - began
        config = self._bare_model.config
        if can_pack([config] if self.has_proposal else [config, self._frozen.config], groups):
            return pack(config, groups, hidden)
        return collate([Item(example, hidden=states) for example, states in zip(examples, hidden, strict=True)])

    def _logits(self, model: Any, inputs: dict[str, Tensor], which: str) -> Logits:
        """With whole rows of the proposal, made once where they are wanted."""
        bare = cache(lambda: self._bare(inputs, which))
        whole = cache(lambda: self._whole(bare(), inputs[f"{which}_tokens"]))
        return super()._logits(model, inputs, which)._replace(proposal=whole)

    def _bare(self, inputs: dict[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
        """The proposal's `answer_logits`."""
        if self.has_proposal:
            return self._bare_logits(self.model, inputs, which)
        with torch.no_grad(), self.compute_loss_context_manager():
            return answer_logits(self._frozen, inputs, which)


def _compared(groups: Sequence[Sequence[Sample]]) -> dict[str, Tensor]:
    """`reward` in float64, `group`, `unscored` and `cut` `[B]`; where they are known, `prefix_reward` in float64 `[N]`."""
    samples = [(slot, sample) for slot, some in enumerate(groups) for sample in some]
    alone = itertools.count(len(groups))
    slots = [slot if sample.score is not None else next(alone) for slot, sample in samples]
    rewards = [0.0 if sample.score is None else sample.score for _, sample in samples]
    before = [_number(score) for _, sample in samples for score in sample.prefix_scores or ()]
    prefixes = {"prefix_reward": torch.tensor(before, dtype=torch.float64)} if before else {}
    return prefixes | {
        "reward": torch.tensor(rewards, dtype=torch.float64),
        "group": torch.tensor(slots),
        "unscored": torch.tensor([sample.score is None for _, sample in samples]),
        "cut": torch.tensor([sample.was_cut for _, sample in samples]),
    }


def _number(score: float | None) -> float:
    return math.nan if score is None else score


class _Loader:
    """What a trainer takes for a data loader: it is asked for one micro-batch after another."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return int(self._trainer.args.max_steps) * self._trainer.updates

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._trainer.micro_batches()
