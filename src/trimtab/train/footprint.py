"""What a computation takes of memory and arithmetic: tensors are followed as operators make and drop them.

It works on real tensors, and on torch's fake ones, which have shapes, dtypes and devices but no values. So the memory of a step
on a model of any size can be told from its configuration alone, by running that very step.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from trimtab.errors import UnsupportedModel

__all__ = ["Ledger", "check_rehearsable", "count_flops", "nbytes"]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of all tensors that are made inside the block, for as long as they live.

    Storages are counted once, whatever views there are. What an operator takes and gives back within itself is not seen.

    Attributes:
        live, peak: bytes now, and at most.
        wide, wide_at_peak: of those, bytes of tensors whose last dimension is one of `widths`.
    """

    def __init__(self, widths: Collection[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.wide = self.wide_at_peak = 0
        self._widths = frozenset(widths)
        self._known: dict[int, tuple[int, bool]] = {}

    def forget_peak(self) -> None:
        """From now on, `peak` is that of what follows."""
        self.peak, self.wide_at_peak = self.live, self.wide

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and note what it made; what it was given and nobody knows was there before."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._note(leaf, 0)
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf, leaf.untyped_storage().nbytes())
        return made

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        wide = bool(tensor.ndim) and tensor.shape[-1] in self._widths
        self._known[key] = size, wide
        weakref.finalize(storage, self._drop, key)
        self.live += size
        self.wide += size * wide
        if self.live > self.peak:
            self.peak, self.wide_at_peak = self.live, self.wide

    def _drop(self, key: int) -> None:
        size, wide = self._known.pop(key)
        self.live -= size
        self.wide -= size * wide


def check_rehearsable(model: Any) -> None:
    """Refuse what torch cannot run on tensors without memory.

    Raises:
        UnsupportedModel: a mixture of experts in another dtype than bfloat16.
    """
    if model.dtype != torch.bfloat16 and any(".experts." in name for name, _ in model.named_parameters()):
        raise UnsupportedModel(
            f"dry_run: this '{model.config.model_type}' model is a mixture of experts, and torch can rehearse those in bfloat16"
            f" alone, not in {str(model.dtype).removeprefix('torch.')}: leave --dry_run out"
        )


def nbytes(tensors: Mapping[Any, Any] | Collection[Any]) -> int:
    """Bytes of all tensors in a collection, however nested; what is shared counts once."""
    found = {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)}
    return sum(storage.nbytes() for storage in found.values())


@contextmanager
def count_flops() -> Iterator[Callable[[], int]]:
    """Count the floating-point operations of matrix products and attention inside the block; the yielded function tells."""
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        yield counter.get_total_flops


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """From the shapes."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """From the shapes."""
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]
