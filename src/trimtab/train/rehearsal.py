"""A training step, and a piece of the caching pass, on models without weights: what they take of memory and arithmetic.

Models are made from their configurations as torch's fake tensors, and the trainer takes its own step on them: the loss, the
autocast, the checkpointing and the optimizer are those of the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, TrainingArguments

from trimtab.core.logprobs import row_from_logits
from trimtab.decode.prefill import CHUNK
from trimtab.decode.scoring import ROW_BUDGET
from trimtab.errors import InvalidOption
from trimtab.train.batches import cached_rows, collate
from trimtab.train.diagnostics import measure
from trimtab.train.examples import Example
from trimtab.train.footprint import Ledger, count_flops, nbytes
from trimtab.train.options import TrainOptions
from trimtab.train.rows import BATCH, CachedRows, compress_each
from trimtab.train.run import prepare_model
from trimtab.train.trainer import AlignerTrainer

__all__ = ["Caching", "Rehearsal", "Step"]


class Step(NamedTuple):
    """What a step takes, in bytes."""

    batch: int
    """The micro-batch, with its compressed rows."""
    saved: int
    """What the forward pass leaves for the backward pass."""
    peak: int
    """The most there is at any time beyond weights and batch: gradients, optimizer state, and all that is passing."""
    wide_at_peak: int
    """Of that, tensors as wide as the vocabulary."""
    gradients: int
    optimizer: int
    rebuilt: int
    """The proposal's rows `[N, V]`, rebuilt from the cache; 0 where the objective needs none."""
    rows: int
    """N, the rows of the wanted answers."""


class Caching(NamedTuple):
    """What the proposal takes while its rows are cached, in bytes."""

    parameters: int
    weights: int
    keys_and_values: int
    passing: int
    """Activations and rows of the vocabulary, at most."""


class Rehearsal:
    """An aligner without weights, in the hands of the trainer.

    Args:
        options: of the run.
        arguments: transformers' part of them; `output_dir` must be a folder that may be written to.
        config: the aligner's configuration.
        vocab_size: V.
        mean_length: mean number of tokens in the training answers.
    """

    def __init__(
        self, options: TrainOptions, arguments: TrainingArguments, config: Any, vocab_size: int, mean_length: float
    ) -> None:
        self._options, self._arguments, self._vocab_size = options, arguments, vocab_size
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
            model = prepare_model(model, options, arguments.seed)
        with self._making():
            _give_devices(model)
            model.to = lambda *args, **kwargs: model  # it was made where it belongs, and torch cannot move it
            self.trainer = AlignerTrainer(
                options,
                vocab_size,
                mean_length,
                model=model,
                args=arguments,
                train_dataset=_Counted(1),
                eval_dataset=_Counted(1),
                data_collator=collate,
            )
            self.trainer.create_optimizer()
            self.trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
            self.model = self.trainer.accelerator.prepare_model(self.trainer.model, evaluation_mode=True)  # unwrapped by DDP
        self._columns = self.model.get_output_embeddings().weight.shape[0]
        self.checkpoint(bool(arguments.activation_checkpointing))

    def checkpoint(self, on: bool) -> None:
        """Recompute activations in the backward pass, or keep them."""
        if on:
            self.trainer.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=self._arguments.activation_checkpointing_kwargs
            )
        else:
            self.trainer.model.activation_checkpointing_disable()

    @property
    def parameters(self) -> list[Tensor]:
        """The aligner's, frozen ones too."""
        return list(self.model.parameters())

    def steps(self, examples: int, processes: int) -> tuple[int, int]:
        """Optimizer steps of a run over so many examples, and the micro-batches of one of the `processes` that share it."""
        launched = self._arguments.world_size == processes  # or else only said, and the trainer knows of one
        self.trainer.train_dataset = _Counted(examples if launched else -(-examples // processes))
        loader = self.trainer.get_train_dataloader()
        _, updates, _, _, _, batches, steps = self.trainer.set_initial_training_values(self._arguments, loader)
        return steps, round(steps / updates * batches)

    def step(self, examples: Sequence[Example]) -> Step:
        """Take optimizer steps on a micro-batch, as long as they differ: the second finds gradients and optimizer state."""
        lengths = collate([(example, None) for example in examples])
        with self._making(), Ledger((self._vocab_size, self._columns)) as ledger:
            batch = self._batch(lengths)
            held = ledger.live
            ledger.forget_peak()
            loss = self.trainer.compute_loss(self.model.train(), batch)
            saved = ledger.live - held
            del loss
            for _ in range(2):
                ledger.forget_peak()
                for _ in range(min(2, self._arguments.gradient_accumulation_steps)):
                    self.trainer.training_step(self.model, batch)
                gradients = nbytes([parameter.grad for parameter in self.parameters])
                self._update()
                optimizer = nbytes([list(state.values()) for state in self.trainer.optimizer.state.values()])
                self.model.zero_grad()
        rows = len(batch["chosen_tokens"])
        rebuilt = 4 * rows * self._vocab_size if "proposal_ids" in batch else 0
        return Step(held, saved, ledger.peak - held, ledger.wide_at_peak, gradients, optimizer, rebuilt, rows)

    def flops(self, examples: Sequence[Example]) -> int:
        """Of one micro-batch, forwards and backwards."""
        lengths = collate([(example, None) for example in examples])
        with self._making(), count_flops() as flops:
            self.trainer.training_step(self.model, self._batch(lengths))
            self.model.zero_grad()
            return flops()

    def evaluation(self, examples: Sequence[Example]) -> int:
        """The most bytes there are beyond weights, gradients and optimizer while a development batch is looked at."""
        rule, weight = self._options.parsed_rule, self._options.starting_weight
        lengths = collate([(example, None) for example in examples])
        with self._making(), torch.no_grad(), Ledger() as ledger:
            batch = self._batch(lengths, rows=True)
            logq = self.trainer._rows(self.model.eval(), batch, "chosen")
            measure(rule, cached_rows(batch, self._vocab_size), logq, weight, batch["chosen_tokens"], 0.95)
        return ledger.peak

    def caching(self, config: Any, dtype: torch.dtype, device: torch.device, longest: int) -> Caching:
        """The proposal's rows of examples of at most `longest` tokens, see `ModelRows`."""
        width = min(max(1, ROW_BUDGET // (BATCH * self._vocab_size)), longest)
        with self._making(device), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
            parameters = list(model.parameters())
            with Ledger() as prefill:
                self._forward(model, min(CHUNK, longest), 1)
            with Ledger() as scoring:
                rows = row_from_logits(self._forward(model, width, width), self._vocab_size)
                tokens = torch.empty(BATCH, width, dtype=torch.long)
                list(compress_each(rows, tokens, [width] * BATCH, self._kept, self._options.proposal_temperature))
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cached = 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize * BATCH * longest
        return Caching(sum(map(Tensor.numel, parameters)), nbytes(parameters), cached, max(prefill.peak, scoring.peak))

    def caching_flops(self, config: Any, examples: Sequence[Example]) -> int:
        """Of the proposal's forward pass over a few examples."""
        with self._making(), torch.no_grad(), count_flops() as flops:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
            for example in examples:
                self._forward(model, len(example.prompt) + len(example.chosen) - 1, len(example.chosen), batch=1)
            return flops()

    @property
    def _kept(self) -> int:
        return min(self._options.cache_top_k or self._vocab_size, self._vocab_size)

    def _forward(self, model: Any, length: int, keep: int, batch: int = BATCH) -> Tensor:
        ids = torch.empty(batch, length, dtype=torch.long)
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        return logits

    def _batch(self, lengths: Mapping[str, Tensor], *, rows: bool = False) -> dict[str, Tensor]:
        """A batch of these shapes, with the proposal's rows where the loss or `rows` want them."""
        batch = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in lengths.items()}
        if rows or self._options.objective == "likelihood":
            n = len(batch["chosen_tokens"])
            blank = CachedRows(
                torch.empty(n, self._kept, dtype=torch.int32),
                torch.empty(n, self._kept),
                torch.empty(n, dtype=torch.int32),
                torch.empty(n),
                torch.empty(n),
            )
            batch |= {f"proposal_{name}": value for name, value in blank._asdict().items()}
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
