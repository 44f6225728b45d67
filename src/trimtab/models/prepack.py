"""Matrix products with weights packed for the CPU, where that is faster.

oneDNN reads a weight that lies in its own order several times faster than `linear` reads a plain one, when only a few rows are
multiplied with it: which is what decoding does. The operators are those that torch's inductor uses when it freezes a model.
Their names are private to torch, so this module alone uses them, checks at load that they give the same result, and takes
them only where they are measured to be faster.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Linear", "prepack"]

ROWS = 8
"""The number of rows that weights are packed for."""
COLD = 2**20
"""Bytes from which a weight will not be in the caches when a step needs it."""
TIMED_ROWS = (1, 5)
"""Rows that a step multiplies: without drafts, and with a few."""


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
        """Whether the stock modules' parameters are still views of the weight; a packed one has nobody else to please."""
        if self.weight is None:
            return True
        start = self.weight.data_ptr()
        for module in self._modules:
            if module.weight.data_ptr() != start or module.weight.dtype != self.weight.dtype:
                return False
            start += module.weight.numel() * module.weight.element_size()
        return True

    def pack(self, *, keep: bool) -> None:
        """Pack the weight, and let go of the plain one unless it is needed elsewhere, as a tied embedding is."""
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
    """Pack those weights for which it is possible, right and faster; how many that is.

    Args:
        linears: matrix products of a model; one of each shape is measured.
        shared: a weight that something else reads too, the embedding: its plain form stays.
    """
    verdicts: dict[torch.Size, bool] = {}
    for linear in linears:
        assert linear.weight is not None
        shape = linear.weight.shape
        if shape not in verdicts:
            verdicts[shape] = _worth_packing(linear.weight)
        if verdicts[shape]:
            linear.pack(keep=linear.weight.data_ptr() == shared.data_ptr())
    return sum(linear.weight is None for linear in linears)


def pack_weight(weight: Tensor) -> Tensor:
    """A weight `[out, in]` in oneDNN's order."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return packed


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with a packed weight."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _worth_packing(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    available: Callable[[], bool] = torch.backends.mkldnn.is_available
    if not available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    with torch.no_grad():
        packed = pack_weight(weight)
        rows = [torch.linspace(-1, 1, n * weight.shape[1]).view(n, -1).to(weight.dtype) for n in TIMED_ROWS]
        for x in rows:
            plain, other = F.linear(x, weight).float(), multiply_packed(x, packed, None).float()
            rounding = torch.finfo(weight.dtype).eps * weight.shape[1] ** 0.5
            if (plain - other).abs().max() > 4 * rounding * plain.abs().max():
                return False
        cold = weight.nbytes >= COLD
        packed_time = sum(_time(partial(multiply_packed, x, packed, None), cold) for x in rows)
        return packed_time < sum(_time(partial(F.linear, x, weight), cold) for x in rows)


def _time(call: Callable[[], Any], cold: bool, repeats: int = 5) -> float:
    """Seconds of the fastest of a few calls, after one to warm up; with the caches cold, as a step finds them, if asked."""
    call()
    others = torch.ones(2**24) if cold else torch.ones(1)
    times = []
    for _ in range(repeats):
        others.sum()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
