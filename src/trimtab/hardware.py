"""What this machine is, in words that can stand beside a measurement."""

import ctypes
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

__all__ = ["describe_hardware", "free_memory", "in_bytes", "keep_freed_memory", "measure_matmul_rate"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
"""Options of glibc's `mallopt`, from its malloc.h."""


def describe_hardware() -> str:
    """The first GPU, or the processor with the number of threads that torch uses; and torch's version."""
    import torch

    if torch.cuda.is_available():
        machine = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    else:
        machine = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{machine}, torch {torch.__version__}"


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next allocation, whichever thread makes it.

    By default glibc gives large pieces back to the system at once, and every step faults the pages of its rows in again. That
    can take longer than the arithmetic on them (benchmarks/row_cost.py). This is for programs, early in their life; a library
    has no business to choose it. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    sizes = {M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 2**30, M_TOP_PAD: 16 * 2**20}
    for option, value in {M_ARENA_MAX: 1, **sizes}.items():
        mallopt(option, value)


def free_memory(device: Any) -> int | None:
    """Bytes that can still be had on a torch device, where the system says."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if device.type == "cpu" and info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def in_bytes(count: float | None) -> str:
    """As people read it, in powers of ten."""
    if count is None:
        return "not known"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def measure_matmul_rate(device: Any, dtype: Any) -> float:
    """Floating-point operations a second of a large square matrix product here, the best of a few."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    one = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
