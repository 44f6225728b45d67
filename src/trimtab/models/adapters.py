"""Many LoRA adapters over one shared base, of which every slot of a batch may use another.

An `AdapterStore` reads and lays out adapters. An `AdapterPool` is the base model with a store of its own. `AdapterPool.read`
loads an adapter's folder as an `Adapted`, a `LanguageModel` that costs only its `Adapter`: one flat tensor. A state says which
adapter each slot uses (`State.adapters`), so a batch may mix them. Nothing but `Adapted` and the states' slots refers to an
adapter: drop those, and its memory is free.

Of a linear layer's product x·Wᵀ an adapter of rank r makes x·Wᵀ + (x·A)·B, its scaling folded into B. The lean pass has four
products a layer, two of them fused from several linear layers: there, A stacks the layers' blocks and B is block-diagonal, so
that each product needs one pair of small ones. Where all slots of a step use the same adapter, the pairs are views of its flat
tensor. Otherwise the adapters are gathered side by side (`Gathered`), padded with zeros to the largest rank, and the pairs are
views of that; a later step writes only the rows whose adapter changed.
"""

import copy
import hashlib
import weakref
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.errors import CheckpointError, UnsupportedModel
from trimtab.extras import need
from trimtab.files import expand_home
from trimtab.models.adapter_layout import Layout, Shape
from trimtab.models.base import LanguageModel, State
from trimtab.models.blocks import LEAN, projections_of
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.lean import Deltas
from trimtab.models.loading import readable
from trimtab.models.lora_folder import read_plain
from trimtab.models.lora_plan import plan_of
from trimtab.models.slots import SlotState
from trimtab.models.weight_files import WEIGHTS_NAME

__all__ = ["Adapted", "Adapter", "AdapterPool", "AdapterStore"]


class Adapter:
    """The weights of one LoRA adapter for one pool's base; equal only to itself.

    Attributes:
        name: what to call it in messages.
        flat: `[size]` all its weights, in the base's dtype and on its device.
        shape: how they are laid out.
        deltas: the same as pairs for the lean pass, where all slots use it.
    """

    def __init__(self, name: str, flat: Tensor, shape: Shape, layout: Layout) -> None:
        self.name, self.flat, self.shape = name, flat, shape
        self.deltas = layout.deltas(flat[None], shape)
        self.reference = weakref.ref(self)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, zeros of padding and fused blocks included."""
        return self.flat.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:…` of its weights and how they are laid out."""
        digest = hashlib.sha256(repr(self.shape).encode())
        digest.update(self.flat.cpu().view(torch.uint8).numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


class Gathered:
    """Copies of the adapters of a state's first slots, side by side.

    Args:
        layout: the pool's.
        shape: one with room for all of the state's adapters.
        flat: `[rows, size]`, a row for each slot, not yet written.

    Attributes:
        held: the adapters of the rows that are written.
    """

    def __init__(self, layout: Layout, shape: Shape, flat: Tensor) -> None:
        self.shape, self.rows = shape, len(flat)
        self.held: list[weakref.ref[Adapter] | None] = []
        self._layout, self._flat = layout, flat
        self._deltas: dict[int, Deltas] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that the copies take."""
        return self._flat.nbytes

    def write(self, row: int, adapter: Adapter | None) -> None:
        """Put an adapter, or none, into a row that is written or the first that is not."""
        self.held[row : row + 1] = [_reference(adapter)]
        target = self._flat[row : row + 1]
        if adapter is not None and adapter.shape == self.shape:
            target.copy_(adapter.flat)
            return
        target.zero_()
        if adapter is not None:
            regions = self._layout.regions(target, self.shape)
            for product, region in self._layout.regions(adapter.flat[None], adapter.shape).items():
                regions[product][:, :, : adapter.shape.rank] = region

    def deltas(self, slots: int) -> Deltas:
        """The pairs of the first rows."""
        if slots not in self._deltas:
            self._deltas[slots] = self._layout.deltas(self._flat[:slots], self.shape)
        return self._deltas[slots]


class AdapterStore:
    """Reads adapters of a model's layers, and lays out those that the slots of a step use.

    Args:
        model: the stock model; its weights are not looked at.
        dtype, device: of the adapters.
        first: the first of its layers that adapters may adapt.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device, first: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self._model, self._first, self._layout = model, first, Layout(model, first)

    def read(self, folder: str | Path, name: str) -> Adapter:
        """Load the folder of a LoRA adapter; the errors are those of `AdapterPool.read`."""
        folder = expand_home(folder)
        values = read_plain(folder)
        with readable(folder, "aligner"):
            plan = self._plan(folder, values)
            if odd := set(plan) - set(self._layout.places):
                known = ", ".join(projections_of(self._model.config))
                where = f", from layer {self._first} on" if self._first else ""
                raise UnsupportedModel(f"'{folder}' adapts {min(odd)}; adapters in a pool adapt {known} only{where}")
            flat, shape = self._fill(folder, load_file(folder / WEIGHTS_NAME), plan)
        return Adapter(name, flat, shape, self._layout)

    def gathered_bytes(self, adapters: Iterable[Adapter]) -> int:
        """What each slot of a step takes in which several of these adapters are used."""
        return self._layout.size(Shape.around(adapter.shape for adapter in adapters)) * self.dtype.itemsize

    def mixing_bytes(self, slots: int, adapters: Collection[Any]) -> int:
        """What so many slots take for these adapters side by side, None among them for a slot without: 0 for one alone."""
        different = set(adapters)
        return slots * self.gathered_bytes(different - {None}) if len(different) > 1 else 0

    def _plan(self, folder: Path, values: dict[str, Any]) -> dict[str, tuple[int, float]]:
        """Rank and scaling of each adapted module. Where only PEFT knows, it lays them out around a base without weights."""
        with torch.device("meta"):
            skeleton = type(self._model)(copy.deepcopy(self._model.config))
        if (plan := plan_of(values, skeleton)) is not None:
            return plan
        need("train", f"'{folder}', an adapter whose adapter_config.json does not name its modules,", "peft")
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import LoraLayer

        config = LoraConfig.from_peft_type(**values)
        inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
        layers = [(path, module) for path, module in skeleton.named_modules() if isinstance(module, LoraLayer)]
        return {path: (layer.r["default"], layer.scaling["default"]) for path, layer in layers}

    def _fill(self, folder: Path, tensors: dict[str, Tensor], plan: dict[str, tuple[int, float]]) -> tuple[Tensor, Shape]:
        """The flat tensor of a file's tensors; every one of them must be expected, and no other."""
        keys = {f"base_model.model.{path}.lora_{half}.weight" for path in plan for half in "AB"}
        for problem, wrong in (("lacks", keys - set(tensors)), ("has no place for", set(tensors) - keys)):
            if wrong:
                raise CheckpointError(
                    f"'{folder}' does not fill the adapter: {problem} {len(wrong)} keys, such as {min(wrong)}"
                )
        places = self._layout.places
        shape = Shape(max(rank for rank, _ in plan.values()), tuple(sorted({places[path].product for path in plan})))
        flat = torch.zeros(1, self._layout.size(shape), dtype=self.dtype, device=self.device)
        regions = self._layout.regions(flat, shape)
        for path, (rank, scaling) in plan.items():
            place = places[path]
            block = regions[place.product][0, place.block, :rank]
            for half, columns, factor in (("A", place.down, 1.0), ("B", place.up, scaling)):
                key, target = f"base_model.model.{path}.lora_{half}.weight", block[:, columns]
                given, target = tensors[key], target if half == "A" else target.mT
                if given.shape != target.shape:
                    raise CheckpointError(
                        f"'{folder}' does not fill the adapter: {key} has shape {list(given.shape)} in its file and"
                        f" {list(target.shape if half == 'A' else target.mT.shape)} in the model"
                    )
                target.copy_(given.to(torch.promote_types(self.dtype, torch.float32)) * factor)
                if not bool(torch.isfinite(target).all()):
                    raise CheckpointError(f"'{folder}' contains NaN or infinite weights in {key}")
        return flat[0], shape

    def deltas(self, state: SlotState, slots: int) -> Deltas | None:
        """What the first slots of a state add to the weights."""
        adapters: list[Adapter | None] = state.adapters[:slots]
        first = adapters[0]
        if all(adapter is first for adapter in adapters):
            state.gathered = None
            return None if first is None else first.deltas
        gathered: Gathered | None = state.gathered
        wanted = [_reference(adapter) for adapter in adapters]
        if gathered is None or gathered.held[:slots] != wanted:
            shape = Shape.around(adapter.shape for adapter in state.adapters if adapter is not None)
            if gathered is None or gathered.shape != shape or gathered.rows < slots:
                state.gathered = gathered = None  # the old one's memory goes before the new one's comes
                rows = min(len(state), 1 << (slots - 1).bit_length())  # a batch that grows slot by slot gathers seldom
                flat = torch.empty(rows, self._layout.size(shape), dtype=self.dtype, device=self.device)
                state.gathered = gathered = Gathered(self._layout, shape, flat)
            for row, adapter in enumerate(adapters):
                if gathered.held[row : row + 1] != wanted[row : row + 1]:
                    gathered.write(row, adapter)
        return gathered.deltas(slots)


class AdapterPool(HuggingFaceLM):
    """The base that adapters share, as a `LanguageModel`: a slot whose adapter is None uses the base alone.

    Args:
        model, args, how: as for `HuggingFaceLM`, without `capture`.

    Raises:
        UnsupportedModel: a base that the lean pass does not run.
    """

    def __init__(self, model: Any, *args: Any, **how: Any) -> None:
        super().__init__(model, *args, **how)
        if self._lean is None:
            kind = self.model.config.model_type
            raise UnsupportedModel(f"adapters can share a plain model of type {', '.join(LEAN)}, not this '{kind}' model")
        self.dtype: torch.dtype = self.model.dtype
        self.store = AdapterStore(self.model, self.dtype, self.device)

    def new_state(self, slots: int, capacity: int) -> SlotState:
        """Empty slots without adapters.

        Raises:
            UnsupportedModel: the base was lent, and its owner has changed its dtype or added something to it.
        """
        state = super().new_state(slots, capacity)
        if self._lean is None or self.model.dtype != self.dtype:
            raise UnsupportedModel("the base model of these adapters is not what it was: its dtype or its modules have changed")
        return state

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """Keys and values, and where slots differ in their adapters, these side by side."""
        return super().state_bytes(slots, capacity) + self.store.mixing_bytes(slots, adapters)

    def read(self, folder: str | Path, name: str) -> "Adapted":
        """Load the folder of a LoRA adapter that was trained on this base.

        Raises:
            UnsupportedModel: `poolable` would have said no.
            CheckpointError: missing, pickled, incomplete, corrupt, unfitting or non-finite weights.
            ModelError: the folder or its configuration cannot be read.
        """
        return Adapted(self, self.store.read(folder, name))

    def _deltas(self, state: SlotState, slots: int) -> Deltas | None:
        return self.store.deltas(state, slots)


class Pool(LanguageModel, Protocol):
    """A language model whose slots may have adapters."""

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of the base."""


class Adapted:
    """A pool's base with one adapter, as a `LanguageModel`. States of the pool and of all its adapters are of one kind.

    Attributes:
        pool: the base.
        adapter: what every slot of a new state gets.
    """

    def __init__(self, pool: Pool, adapter: Adapter) -> None:
        self.pool, self.adapter = pool, adapter
        self.vocab_size, self.max_length, self.device = pool.vocab_size, pool.max_length, pool.device

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of base and adapter together."""
        return f"sha256:{hashlib.sha256(f'{self.pool.fingerprint} {self.adapter.fingerprint}'.encode()).hexdigest()}"

    def new_state(self, slots: int, capacity: int) -> State:
        """Empty slots that use the adapter."""
        state = self.pool.new_state(slots, capacity)
        state.adapters = [self.adapter] * slots
        return state

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """What a state of the pool takes."""
        return self.pool.state_bytes(slots, capacity, adapters)

    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; rows `[B, K, V]`, each by its slot's own adapter."""
        return self.pool.extend(state, tokens, counts)

    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; the row `[B, 1, V]` after its last token."""
        return self.pool.prefill(state, tokens, counts)

    def rollback(self, state: State, counts: Sequence[int]) -> None:
        """Forget the last tokens of each slot."""
        self.pool.rollback(state, counts)

    def copy(self, source: State, slots: Sequence[int], target: State, to: Sequence[int]) -> None:
        """Copy slots, adapters included."""
        self.pool.copy(source, slots, target, to)

    def select(self, state: State, rows: Sequence[int]) -> State:
        """Copies of the given slots, adapters included."""
        return self.pool.select(state, rows)


def _reference(adapter: Adapter | None) -> weakref.ref[Adapter] | None:
    return None if adapter is None else adapter.reference
