"""What this machine is, in words that can stand beside a measurement."""

import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["describe_hardware", "free_memory"]


def describe_hardware() -> str:
    """The first GPU, or the processor with the number of threads that torch uses."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def free_memory(device: Any) -> int | None:
    """Bytes that can still be had on a torch device, where the system says."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if device.type == "cpu" and info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
