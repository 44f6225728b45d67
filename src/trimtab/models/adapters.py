"""Many LoRA adapters over one shared base, of which every slot of a batch may use another.

An `AdapterStore` reads and lays out adapters. An `AdapterPool` is the base model with a store of its own. `AdapterPool.read`
loads an adapter's folder as an `Adapted`, a `LanguageModel` that costs only its `Adapter`: one flat tensor. A state says which
adapter each slot uses (`State.adapters`), so a batch may mix them. Nothing but `Adapted` and the states' slots refers to an
adapter: drop those, and its memory is free.

Of a linear layer's product x·Wᵀ an adapter of rank r makes x·Wᵀ + (x·A)·B, its scaling folded into B. The lean pass has four
products a layer, two of them fused from several linear layers: there, A stacks the layers' blocks and B is block-diagonal, so
that each product needs one pair of small ones. Where all slots of a step use the same adapter, the pairs are views of its flat
tensor. Otherwise the adapters are gathered side by side (`Gathered`), padded with zeros to the largest rank, and the pairs are
views of that; a later step writes only the rows whose adapter changed. A slot may use a `Blend` of adapters, too; of a few
adapters, any number of blends are stacked (`Stacked`).
"""

import copy
import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.errors import CheckpointError, UnsupportedModel
from trimtab.files import expand_home
from trimtab.models.adapter_layout import Layout, Shape
from trimtab.models.adapter_mixing import FEW, Gathered, Stacked, are_few, distinct
from trimtab.models.adapter_values import Adapter, Blend
from trimtab.models.base import LanguageModel, State
from trimtab.models.blocks import LEAN, projections_of
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.lean import Deltas
from trimtab.models.loading import readable
from trimtab.models.lora_folder import read_plain
from trimtab.models.lora_plan import check_keys, key_of, plan_or_peft
from trimtab.models.slots import SlotState
from trimtab.models.weight_files import WEIGHTS_NAME

__all__ = ["Adapted", "AdapterPool", "AdapterStore"]


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

    def stack(self, adapters: Sequence[Adapter]) -> Stacked:
        """What `deltas` makes by itself where a state has nothing of the kind, for any blends of these, and for good."""
        return Stacked(self._layout, adapters, for_good=True)

    def gathered_bytes(self, adapters: Iterable[Adapter | Blend]) -> int:
        """What each slot of a step takes in which several of these are used."""
        return self._layout.size(Shape.around(adapter.shape for adapter in adapters)) * self.dtype.itemsize

    def stacked_bytes(self, adapters: Iterable[Adapter]) -> int:
        """What all slots of a step take together, in which blends of these are used."""
        return self._layout.size(Shape.beside(adapter.shape for adapter in adapters)) * self.dtype.itemsize

    def mixing_bytes(self, slots: int, adapters: Collection[Any]) -> int:
        """What so many slots take for these adapters side by side, None among them for a slot without: 0 for one alone.

        Where they are too many to be stacked, there may have been fewer before.
        """
        different = set(adapters)
        some = different - {None}
        if not any(isinstance(one, Blend) for one in some):
            return slots * self.gathered_bytes(some) if len(different) > 1 else 0
        if are_few(list(some)):
            return self.stacked_bytes(distinct(list(some)))
        return max(slots, FEW) * self.gathered_bytes(some)

    def _plan(self, folder: Path, values: dict[str, Any]) -> dict[str, tuple[int, float]]:
        """Rank and scaling of each adapted module."""
        with torch.device("meta"):
            skeleton = type(self._model)(copy.deepcopy(self._model.config))
        return plan_or_peft(folder, values, skeleton)

    def _fill(self, folder: Path, tensors: dict[str, Tensor], plan: dict[str, tuple[int, float]]) -> tuple[Tensor, Shape]:
        """The flat tensor of a file's tensors; every one of them must be expected, and no other."""
        check_keys(folder, plan, tensors)
        places = self._layout.places
        shape = Shape(max(rank for rank, _ in plan.values()), tuple(sorted({places[path].product for path in plan})))
        flat = torch.zeros(1, self._layout.size(shape), dtype=self.dtype, device=self.device)
        regions = self._layout.regions(flat, shape)
        for path, (rank, scaling) in plan.items():
            place = places[path]
            block = regions[place.product][0, place.block, :rank]
            for half, columns, factor in (("A", place.down, 1.0), ("B", place.up, scaling)):
                key, target = key_of(path, half), block[:, columns]
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
        values: list[Adapter | Blend | None] = state.adapters[:slots]
        first = values[0]
        if all(value == first for value in values):
            if not isinstance(first, Blend):
                state.gathered = None
                return None if first is None else first.deltas
            if not isinstance(state.gathered, Stacked):
                return self._gathered(state, [first], [first]).deltas(1)
        if are_few(state.adapters):
            return self._stacked(state).deltas(values)
        return self._gathered(state, values, state.adapters).deltas(slots)

    def _stacked(self, state: SlotState) -> Stacked:
        """The adapters that the state's slots use, once each."""
        stacked, wanted = state.gathered, distinct(state.adapters)
        if not isinstance(stacked, Stacked) or not stacked.serves(wanted):
            state.gathered = stacked = None  # the old one's memory goes before the new one's comes
            state.gathered = stacked = Stacked(self._layout, wanted)
        return stacked

    def _gathered(
        self, state: SlotState, values: Sequence[Adapter | Blend | None], around: Sequence[Adapter | Blend | None]
    ) -> Gathered:
        """A row for each of these, with room for what stands around them, too."""
        gathered, slots = state.gathered, len(values)
        wanted = [None if value is None else value.reference for value in values]
        if not isinstance(gathered, Gathered) or gathered.held[:slots] != wanted:
            shape = Shape.around(value.shape for value in around if value is not None)
            if not isinstance(gathered, Gathered) or gathered.shape != shape or gathered.rows < slots:
                state.gathered = gathered = None
                rows = min(len(state), 1 << (slots - 1).bit_length())  # a batch that grows slot by slot gathers seldom
                flat = torch.empty(rows, self._layout.size(shape), dtype=self.dtype, device=self.device)
                state.gathered = gathered = Gathered(self._layout, shape, flat)
            for row, value in enumerate(values):
                if gathered.held[row : row + 1] != wanted[row : row + 1]:
                    gathered.write(row, value)
        return gathered


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

    def __init__(self, pool: Pool, adapter: Adapter | Blend) -> None:
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
