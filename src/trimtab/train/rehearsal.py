"""A training step on a model without weights: what it takes of memory and arithmetic.

The model is made from its configuration, of torch's fake tensors, and the trainer takes its own step on it: the loss, the
autocast, the checkpointing and the optimizer are those of the run. Of a head the model is the proposal's upper layers; the
others are only held.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, TrainingArguments

from trimtab.data.examples import Example
from trimtab.errors import InvalidOption
from trimtab.models.lean import no_lean_pass
from trimtab.models.loading import attention_for
from trimtab.models.stock import is_stock
from trimtab.train.arguments import checkpoints, switch_checkpointing
from trimtab.train.batches import ExampleDataset, Item, collate
from trimtab.train.cache import ProposalCache
from trimtab.train.footprint import Ledger, check_rehearsable, count_flops, nbytes
from trimtab.train.head import HeadPlan, adapted_upper
from trimtab.train.pieces import shape
from trimtab.train.plan import Plan
from trimtab.train.ranks import Ranks
from trimtab.train.start import prepare_model
from trimtab.train.taught_rows import TaughtCache
from trimtab.train.trainer import AlignerTrainer

__all__ = ["Rehearsal", "Step", "largest_step"]


class Step(NamedTuple):
    """What a step takes, in bytes."""

    batch: int
    """The micro-batch, with its compressed rows."""
    saved: int
    """What the forward pass leaves for the backward pass."""
    peak: int
    """The most there is at any time beyond weights and batch: gradients, optimizer state, and all that is passing."""
    peak_otherwise: int
    """The same with checkpointed activations, if they are not, or without."""
    wide_at_peak: int
    """Of `peak`, tensors as wide as the vocabulary."""
    gradients: int
    optimizer: int
    rebuilt: int
    """The proposal's rows `[N, V]`, rebuilt from the cache; 0 where the objective needs none."""


class Rehearsal:
    """An aligner without weights, in the hands of the trainer.

    Args:
        plan: of the run.
        arguments: transformers' part of them; `output_dir` must be a folder that may be written to.
        config: the aligner's configuration; of a head its proposal's.
        vocab_size: V.
        mean_length: mean number of tokens in the training answers.
        lora: of an aligner that is an adapter on a model of that configuration.
        head: of an aligner that is a head.

    Raises:
        UnsupportedModel: a head of a proposal whose layers cannot be run one by one, or a mixture of experts in another dtype
            than bfloat16.
    """

    def __init__(
        self,
        plan: Plan,
        arguments: TrainingArguments,
        config: Any,
        vocab_size: int,
        mean_length: float,
        lora: Any = None,
        head: HeadPlan | None = None,
    ) -> None:
        self._plan, self._arguments, self._vocab_size = plan, arguments, vocab_size
        self._collate = partial(collate, edits=plan.objective.edits)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            dtype = head.dtype if head else torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_for(config))
            below: list[Tensor] = []
            if head:
                if not is_stock(model):
                    raise no_lean_pass(config.model_type)
                below = list(model.model.layers[: head.tap].parameters())
                model = adapted_upper(model, head.tap, head.lora, arguments.seed)
            else:
                model = prepare_model(model, plan, arguments.seed, lora)
            check_rehearsable(model)
        self._hidden = (config.hidden_size, dtype) if head and head.tap else None
        with self._making():
            self._below = [torch.empty(parameter.shape, dtype=dtype) for parameter in below]
            _give_devices(model)
            model.to = lambda *args, **kwargs: model  # it was made where it belongs, and torch cannot move it
            self.trainer = AlignerTrainer(
                plan,
                vocab_size,
                mean_length,
                model=model,
                args=arguments,
                train_dataset=_Counted(1),
                eval_dataset=_Counted(1),
                data_collator=self._collate,
            )
            self.trainer.create_optimizer()
            self.trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
            self.model = self.trainer.accelerator.prepare_model(self.trainer.model, evaluation_mode=True)  # unwrapped by DDP
        self._columns = self.model.get_output_embeddings().weight.shape[0]
        self.checkpoint(checkpoints(arguments))

    def checkpoint(self, on: bool) -> None:
        """Recompute activations in the backward pass, or keep them."""
        self._checkpointing = on
        switch_checkpointing(self.trainer.model, self._arguments, on)

    @property
    def parameters(self) -> list[Tensor]:
        """The aligner's, frozen ones too; with a head, all of its proposal's, which stays in memory."""
        return [*self.model.parameters(), *self._below]

    def steps(self, examples: int, processes: int) -> tuple[int, int]:
        """Optimizer steps of a run over so many examples, and the micro-batches of one of the `processes` that share it."""
        self.trainer.train_dataset = _Counted(examples)
        self.trainer._ranks = Ranks(0, processes)
        loader = self.trainer.get_train_dataloader()
        _, updates, _, _, _, batches, steps = self.trainer.set_initial_training_values(self._arguments, loader)
        return int(steps), round(steps / updates * batches)

    def step(self, examples: Sequence[Example], kept: int = 0) -> Step:
        """Take two optimizer steps on a micro-batch: the second finds gradients, if it adds to some, and optimizer state.

        The first `kept` examples are what the proposal said itself.
        """
        lengths = self._collate([Item(example, kept=i < kept) for i, example in enumerate(examples)])
        with self._making(), Ledger((self._vocab_size, self._columns)) as ledger:
            batch = self._batch(lengths)
            held = ledger.live
            loss = self.trainer.compute_loss(self.model.train(), batch)
            saved = ledger.live - held
            self.trainer.accelerator.backward(loss)
            del loss
            gradients = nbytes([parameter.grad for parameter in self.parameters])
            self._update()
            optimizer = nbytes([list(state.values()) for state in self.trainer.optimizer.state.values()])
            ledger.forget_peak()
            self._step(batch)
            peak, wide = ledger.peak, ledger.wide_at_peak
            self.checkpoint(not self._checkpointing)
            ledger.forget_peak()
            self._step(batch)
            self.checkpoint(not self._checkpointing)
            self.model.zero_grad()
            self.trainer.optimizer.state.clear()
        rebuilds = "chosen_proposal_ids" in batch
        if self._plan.trains_head:  # whose own layers have them
            rebuilds = self._plan.objective.reads(self._plan.setting)
        rebuilt = 4 * len(batch["chosen_tokens"]) * self._vocab_size * rebuilds
        return Step(held, saved, peak - held, ledger.peak - held, wide, gradients, optimizer, rebuilt)

    def _step(self, batch: dict[str, Tensor]) -> None:
        if self._arguments.gradient_accumulation_steps == 1:
            self.model.zero_grad()
        self.trainer.training_step(self.model, batch)
        self._update()

    def flops(self, examples: Sequence[Example], kept: int = 0) -> int:
        """Of one micro-batch, forwards and backwards; the first `kept` examples are what the proposal said itself."""
        lengths = self._collate([Item(example, kept=i < kept) for i, example in enumerate(examples)])
        with self._making(), count_flops() as flops:
            self.trainer.training_step(self.model, self._batch(lengths))
            self.model.zero_grad()
            return int(flops())

    def evaluation(self, examples: Sequence[Example], development: Sequence[Example]) -> int:
        """The most bytes there are beyond weights, gradients and optimizer while development examples are looked at.

        Args:
            examples: what is trained on, which says how much may be looked at together.
            development: from which the batches with the most tokens and with the most logits are taken.
        """
        self.trainer.train_dataset = ExampleDataset(examples)
        room, pairs = self.trainer.room, all(example.rejected for example in development)
        batches = room.batches(development, self._arguments.eval_batch_size)
        shapes = [shape([development[i] for i in batch]) for batch in batches]
        largest = {shapes.index(max(shapes, key=size)) for size in (attrgetter("tokens"), attrgetter("rows"))}
        return max(self._look([development[i] for i in batches[number]], room.piece, pairs) for number in largest)

    def _look(self, examples: Sequence[Example], most: int, pairs: bool) -> int:
        lengths = self._collate([Item(example) for example in examples])
        with self._making(), torch.no_grad(), Ledger() as ledger:
            self.model.eval()
            batch = self._batch(lengths, rows=True, pairs=pairs)
            self.trainer.look(batch, self.trainer.passes(batch, most, pairs=pairs))
        return int(ledger.peak)

    def _batch(self, lengths: Mapping[str, Tensor], *, rows: bool = False, pairs: bool | None = None) -> dict[str, Tensor]:
        """A batch of these shapes, with the proposal's rows where the loss or `rows` want them, and a head's hidden states.

        Of unwanted answers the latter are there if `pairs` are looked at: where the loss needs them, unless it is said.
        """
        batch = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in lengths.items()}
        if self._hidden is not None:
            width, dtype = self._hidden
            both = self._plan.reads_rejected if pairs is None else pairs
            for which in ("chosen", "rejected") if both else ("chosen",):
                batch[f"{which}_hidden"] = torch.empty(*batch[f"{which}_ids"].shape, width, dtype=dtype)
        kinds = {which for part, which in self._plan.cached_answers if rows or part == "train"}
        for which in sorted(kinds):
            taught, plan = which == "teacher", self._plan
            kind, layout = (TaughtCache, plan.taught_layout) if taught else (ProposalCache, plan.row_layout)
            n = len(batch["chosen_tokens" if taught else f"{which}_tokens"])
            for name, (dtype, sides) in kind.columns(layout(self._vocab_size)).items():
                batch[f"{which}_proposal_{name}"] = torch.empty(n, *sides, dtype=dtype)
        return batch

    def _update(self) -> None:
        try:
            self.trainer.optimizer.step()
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            name = self._arguments.optim
            raise InvalidOption(
                f"optim: '{name}' cannot be tried without weights, so --dry_run cannot tell its size: {error}"
            ) from error

    @contextmanager
    def _making(self, device: torch.device | None = None) -> Iterator[None]:
        """Tensors that are made here have no values. They are on the trainer's device, or on the one that is named."""
        with self._mode, torch.device(device or self._arguments.device):
            yield


def largest_step(rehearsal: Rehearsal, examples: Sequence[Example], kept: Sequence[Example], size: int) -> Step:
    """What the micro-batch of `size` examples takes that takes most, of the data and of what the proposal said itself."""
    return max((rehearsal.step(*batch) for batch in _largest(examples, kept, size)), key=lambda step: step.batch + step.peak)


def _largest(examples: Sequence[Example], kept: Sequence[Example], size: int) -> list[tuple[list[Example], int]]:
    """Micro-batches of which one takes most, each with the number of examples in it, its first ones, that are kept.

    A long prompt of what is kept and a long answer of the data pad both; and what a batch of the two takes, as padded, is a
    maximum of lines in how many are kept: so few or many of them take most.
    """
    longest = sorted(examples, key=lambda example: example.length, reverse=True)[:size]
    few = {min(1, len(kept)), min(max(1, size - 1), len(kept))} - {0}
    return [(longest, 0), *(([*kept[:count], *longest[: size - count]], count) for count in sorted(few))]


def _give_devices(model: Any) -> None:
    """Turn the meta tensors of a module into fake ones on the default device; those that are shared stay shared."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                module._parameters[name] = known.setdefault(id(parameter), made)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Counted(torch.utils.data.Dataset[Any]):
    """So many examples that nobody has seen yet."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> list[int]:
        """All alike."""
        return [1] * self._count

    weights = None
