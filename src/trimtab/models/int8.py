"""Weights as integers of 8 bits with a scale for each row, multiplied by torch's own kernel.

Decoding reads every weight once for a few rows, so a quarter of the bytes is less than half of the time. Rows are rounded to
bfloat16 before they are multiplied, and so are products, as in a bfloat16 model. A row's scale is the least bfloat16 number
that brings its largest weight within ±127: symmetric, to the nearest (Dettmers et al., arXiv 2208.07339, without outliers).

The kernel's name is private to torch, and shapes that it does not expect end the process: so this module alone calls it, for
shapes that it was made for.
"""

import platform
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Int8", "can_be_int8"]

LARGEST = 127
IN, OUT = 64, 16
"""What inputs and outputs must be multiples of."""
FEW = 32
"""Rows up to which the kernel is faster than plain products with the weight made whole."""
MACHINES = ("x86_64", "AMD64")


def can_be_int8(weight: Tensor) -> bool:
    """Whether a weight `[out, in]` can be kept so, and multiplied on this machine."""
    fits = weight.shape[0] % OUT == 0 and weight.shape[1] % IN == 0
    floats = weight.dtype in (torch.float32, torch.bfloat16)
    return fits and floats and weight.device.type == "cpu" and platform.machine() in MACHINES


class Int8(NamedTuple):
    """A weight W `[out, in]`, within half a scale of what it was."""

    codes: Tensor
    """`[out, in]`, from −127 to 127."""
    scales: Tensor
    """`[out]`, bfloat16."""

    @classmethod
    def of(cls, weight: Tensor) -> "Int8":
        """The nearest there is."""
        wanted = weight.float().abs().amax(1).div(LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny)
        scales = wanted.bfloat16()
        scales = torch.where(scales.float() < wanted, scales.nextafter(scales.new_full((), torch.inf)), scales)
        return cls(weight.float().div(scales.float()[:, None]).round().to(torch.int8), scales)

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.codes.nbytes + self.scales.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + b of rows `[n, in]`, in their dtype."""
        rows = x.bfloat16()
        if len(x) <= FEW:
            product = torch._weight_int8pack_mm(rows, self.codes, self.scales)
        else:
            product = (F.linear(rows.float(), self.codes.float()) * self.scales.float()).bfloat16()
        product = product.to(x.dtype)
        return product if bias is None else product + bias
