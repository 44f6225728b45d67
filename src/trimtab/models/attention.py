"""Which of torch's attention kernels a pass may use on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["without_cudnn"]


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Leave out cuDNN's attention, which torch prefers on Hopper.

    It builds a plan for every batch size and length that it meets, which takes 70 ms to a second (pytorch/pytorch#155958), and
    nearly every step of decoding, and most batches of training, have a length of their own. The switch is the process's, as
    torch has it: what other threads compute meanwhile goes without, too.
    """
    switch = torch.backends.cuda.enable_cudnn_sdp
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
        yield
        return
    switch(False)
    try:
        yield
    finally:
        switch(True)
