"""Matrix products with weights packed for the CPU, where that is faster.

oneDNN reads a weight that lies in its own order up to twice as fast as `linear` reads a plain one, when only a few rows are
multiplied with it: which is what decoding does. The operators are those that torch's inductor uses when it freezes a model.
Their names are private to torch, so this module alone uses them.

A packed product has other last bits than a plain one, so which weights are packed is part of what a seed means. It depends on
their shape, on their dtype and on what the CPU can do, and never on a clock or on the weights' values: every process of a
machine decides alike. A weight that this machine cannot pack, or whose packed product is not the plain one, stays as it is.

The operators' errors are written down nowhere, and a command never needs them. So any error of theirs leaves the weights plain.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.models.int8 import Int8
from trimtab.reasons import reason_of

__all__ = ["DTYPES", "PACKED_FROM", "Linear", "packed_dtypes", "prepack"]

DTYPES = (torch.float32, torch.bfloat16)
"""What oneDNN is asked to pack."""
PACKED_FROM = 2**20
"""Numbers in a weight from which it is packed: with fewer, calling oneDNN takes longer than what it saves."""
ROWS = 8
"""The number of rows that weights are packed for."""
TRIED_ROWS = (1, 2, 3, 5, 8, 17, 64)
"""Rows that a pass multiplies: of one prompt and of a few, with drafts, and of a prompt that is read."""

logger = logging.getLogger(__name__)


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
        self._int8: Int8 | None = None

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
        if self._int8 is not None:
            return self._int8.multiply(x, self.bias)
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)

    @property
    def is_int8(self) -> bool:
        """Whether the weight is kept in 8 bits."""
        return self._int8 is not None

    def pack(self, *, keep: bool) -> None:
        """Pack the weight, and then let go of the plain one unless it is needed elsewhere, as a tied embedding is.

        Raises:
            Exception: this machine cannot; nothing has changed.
        """
        assert self.weight is not None
        self._packed = pack_weight(self.weight)
        self._let_go(keep=keep)

    def quantize(self, *, keep: bool) -> int:
        """Keep the weight in 8 bits, which it must fit (`can_be_int8`); how many bytes that takes. `keep` is as in `pack`."""
        assert self.weight is not None
        self._int8 = Int8.of(self.weight)
        self._let_go(keep=keep)
        return self._int8.num_bytes

    def _let_go(self, *, keep: bool) -> None:
        assert self.weight is not None
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

    Only where memory ends while weights are packed does it matter what else runs: the rest stay as they are, with a warning.

    Args:
        linears: matrix products of a model; one of each shape is tried.
        shared: a weight that something else reads too, the embedding: its plain form stays.
    """
    can: dict[tuple[torch.Size, torch.dtype, bool], bool] = {}
    for linear in linears:
        weight = linear.weight
        assert weight is not None
        if weight.numel() < PACKED_FROM or weight.device.type != "cpu":
            continue
        kind = (weight.shape, weight.dtype, linear.bias is not None)
        if kind not in can:
            can[kind] = _can_pack(*kind)
        if can[kind]:
            try:
                linear.pack(keep=weight.data_ptr() == shared.data_ptr())
            except Exception as error:  # see above
                logger.warning(
                    "a weight of shape %s is not packed, though this machine packs such ones: %s. Last bits may differ from"
                    " those of other runs",
                    list(weight.shape),
                    reason_of(error),
                )
    return sum(linear.weight is None for linear in linears)


def packed_dtypes() -> list[str]:
    """The dtypes whose large weights this machine packs."""
    shape = torch.Size([PACKED_FROM // 2**10, 2**10])
    return [str(dtype).removeprefix("torch.") for dtype in DTYPES if _can_pack(shape, dtype, False)]


def pack_weight(weight: Tensor) -> Tensor:
    """A weight `[out, in]` in oneDNN's order.

    Raises:
        Exception: the CPU lacks the instructions (`RuntimeError`), torch the operator (`AttributeError`), or whatever else.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return packed


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with a packed weight."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


@torch.no_grad()
def _can_pack(shape: torch.Size, dtype: torch.dtype, with_bias: bool) -> bool:
    """Whether this machine packs such weights and multiplies rows with them as `linear` does: by trying one of made numbers."""
    if dtype not in DTYPES:
        return False
    columns = shape[1]
    rounding, adding = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * columns**0.5
    try:
        weight = torch.outer(torch.arange(shape[0]).sin().to(dtype), (torch.arange(columns) % 97).to(dtype)).sin_()
        bias = torch.arange(shape[0]).cos().to(dtype) if with_bias else None
        packed = pack_weight(weight)
        rows = [torch.arange(count * columns).sin().view(count, -1).to(dtype) for count in TRIED_ROWS]
        products = [(F.linear(x, weight, bias), multiply_packed(x, packed, bias)) for x in rows]
        del packed
        weight.abs_()
        return all(
            other.dtype == plain.dtype
            and other.shape == plain.shape
            and bool(
                (plain.float() - other.float()).abs().max()
                <= 2 * rounding * plain.float().abs().max() + adding * F.linear(x.abs(), weight).float().max()
            )
            for x, (plain, other) in zip(rows, products, strict=True)
        )
    except Exception:  # see above: what a CPU, a build or a version of torch raises without it
        return False
