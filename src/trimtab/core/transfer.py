"""From the host's numbers to a tensor on a device, without waiting for what the device is doing."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["to_device"]

QUEUED = ("cuda",)
"""Types of devices whose copies from pinned memory wait their turn."""


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor(values, device=device)`, queued behind the work of a GPU instead of waiting for it to end.

    `torch.tensor` copies from ordinary memory, which CUDA does not return from before all that was asked of the stream is done.
    From pinned memory it does, if it lies as the copy will; torch keeps that memory until the copy has been made.

    Args:
        values: numbers, lists of them, or a tensor of the host.
        device: where to put them.
        dtype: default: what torch makes of them.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type not in QUEUED:
        return host.to(device)
    return host.contiguous().pin_memory().to(device, non_blocking=True)
