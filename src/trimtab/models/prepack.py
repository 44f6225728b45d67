"""Matrix products with weights packed for the CPU, where that is faster.

oneDNN reads a weight that lies in its own order up to twice as fast as `linear` reads a plain one, when only a few rows are
multiplied with it: which is what decoding does. The operators are those that torch's inductor uses when it freezes a model.
Their names are private to torch, so this module alone uses them.

A packed product has other last bits than a plain one, so which weights are packed is part of what a seed means. It depends on
their shape, on their dtype and on what the CPU can do, and never on a clock: every process of a machine decides alike. A weight
that this machine cannot pack, or whose packed product is not the plain one, stays as it is.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DTYPES", "PACKED_FROM", "Linear", "packed_dtypes", "prepack"]

DTYPES = (torch.float32, torch.bfloat16)
"""What oneDNN is asked to pack."""
PACKED_FROM = 2**20
"""Numbers in a weight from which it is packed: with fewer, calling oneDNN takes longer than what it saves."""
ROWS = 8
"""The number of rows that weights are packed for."""
TRIED_ROWS = (1, 5, 64)
"""Rows that a pass multiplies: without drafts, with a few, and of a prompt."""


class Linear:
    """y = x·Wᵀ + b. Make one with `of`.

    Args:
        weight: W `[out, in]`.
        bias: b `[out]`, or None.
        modules: the stock modules whose parameters are views of these.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, modules: Sequence[Any]) -> None:
        self.weight: Tensor | None = weight
        self.bias = bias
        self._modules = modules
        self._packed: Tensor | None = None

    @classmethod
    def of(cls, *modules: Any) -> "Linear":
        """One product for one or several linear modules of the same input; their parameters become views of its own."""
        if len(modules) == 1:
            bias = modules[0].bias
            return cls(modules[0].weight.detach(), None if bias is None else bias.detach(), modules)
        with_bias = [module.bias is not None for module in modules]
        weight = _as_one([module.weight for module in modules])
        bias = _as_one([module.bias for module in modules]) if all(with_bias) else None
        if weight is not None and (bias is not None or not any(with_bias)):
            return cls(weight, bias, modules)
        with torch.inference_mode(mode=False), torch.no_grad():  # a lent model must stay one that can be trained
            weight = torch.cat([module.weight for module in modules])
            biases = [m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in modules]
            bias = torch.cat(biases) if any(m.bias is not None for m in modules) else None
            start = 0
            for module in modules:
                end = start + len(module.weight)
                module.weight.data = weight[start:end]
                if module.bias is not None and bias is not None:
                    module.bias.data = bias[start:end]
                start = end
        return cls(weight, bias, modules)

    def __call__(self, x: Tensor) -> Tensor:
        """Rows `[..., in]` to rows `[..., out]`."""
        if self._packed is not None:
            return multiply_packed(x, self._packed, self.bias)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)

    @property
    def is_current(self) -> bool:
        """Whether the stock modules' parameters are still views of these; a packed weight has nobody else to please."""
        if self.weight is None:
            return True
        start = 0
        for module in self._modules:
            for whole, part in ((self.weight, module.weight), (self.bias, module.bias)):
                if part is not None and (
                    whole is None or part.dtype != whole.dtype or part.data_ptr() != whole[start:].data_ptr()
                ):
                    return False
            start += len(module.weight)
        return True

    def pack(self, *, keep: bool) -> None:
        """Pack the weight, and then let go of the plain one unless it is needed elsewhere, as a tied embedding is.

        Raises:
            RuntimeError: this machine cannot; nothing has changed.
        """
        assert self.weight is not None
        self._packed = pack_weight(self.weight)
        if not keep:
            for module in self._modules:
                module.weight.data = self.weight.new_empty(0)
        self.weight = None


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor of which these are the consecutive parts already, if they are: another decoder has stacked them."""
    start = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != start or not part.is_contiguous() or part.dtype != parts[0].dtype:
            return None
        start += part.numel() * part.element_size()
    storage = parts[0].untyped_storage()
    if any(part.untyped_storage().data_ptr() != storage.data_ptr() for part in parts):
        return None
    first = parts[0].detach()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())


def prepack(linears: Sequence[Linear], *, shared: Tensor) -> int:
    """Pack the weights that are large enough, where this machine can; how many those are.

    Args:
        linears: matrix products of a model; one of each shape is tried.
        shared: a weight that something else reads too, the embedding: its plain form stays.
    """
    can: dict[tuple[torch.Size, bool], bool] = {}
    for linear in linears:
        assert linear.weight is not None
        if linear.weight.numel() < PACKED_FROM:
            continue
        kind = (linear.weight.shape, linear.bias is None)
        if kind not in can:
            can[kind] = _can_pack(linear.weight, linear.bias)
        if can[kind]:
            with contextlib.suppress(RuntimeError):  # there may be no memory for one more
                linear.pack(keep=linear.weight.data_ptr() == shared.data_ptr())
    return sum(linear.weight is None for linear in linears)


def packed_dtypes() -> list[str]:
    """The dtypes whose large weights this machine packs."""
    weight = torch.arange(PACKED_FROM).cos().view(-1, 2**10)
    return [str(dtype).removeprefix("torch.") for dtype in DTYPES if _can_pack(weight.to(dtype), None)]


def pack_weight(weight: Tensor) -> Tensor:
    """A weight `[out, in]` in oneDNN's order.

    Raises:
        RuntimeError: the CPU lacks the instructions.
        AttributeError: torch lacks the operator.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return packed


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with a packed weight."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


@torch.no_grad()
def _can_pack(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this machine packs a weight and multiplies rows with it as `linear` does: by trying."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return False
    rounding, adding = torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps * weight.shape[1] ** 0.5
    try:
        packed = pack_weight(weight)
        for rows in TRIED_ROWS:
            x = torch.arange(rows * weight.shape[1]).sin().view(rows, -1).to(weight.dtype)
            plain, other = F.linear(x, weight, bias), multiply_packed(x, packed, bias)
            terms = F.linear(x.abs(), weight.abs()).float().max()
            difference, most = (plain.float() - other.float()).abs().max(), plain.float().abs().max()
            if other.dtype != plain.dtype or not difference <= 2 * rounding * most + adding * terms:  # "not": it may be NaN
                return False
    except (AttributeError, RuntimeError):  # what a CPU, a build or a version of torch without it raises
        return False
    return True
