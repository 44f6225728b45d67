"""`trimtab env`: versions and hardware, and what this machine decides about the arithmetic."""

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from trimtab import __version__

__all__ = ["Options", "render", "run"]

PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "datasets", "huggingface_hub")


@dataclass(frozen=True)
class Options:
    """`trimtab env` has no flags of its own."""


def run(options: Options) -> dict[str, Any]:
    """Look around."""
    from trimtab.hardware import describe_hardware
    from trimtab.models.prepack import PACKED_FROM, packed_dtypes

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    system = {"python": sys.version.split()[0], "platform": platform.platform()}
    packing = {"dtypes": packed_dtypes(), "from_numbers": PACKED_FROM}
    return {"trimtab": __version__, **system, "packages": packages, "hardware": describe_hardware(), "packing": packing}


def render(report: dict[str, Any]) -> str:
    """One fact a line."""
    packing = report["packing"]
    packed = f"{' and '.join(packing['dtypes'])} weights of {packing['from_numbers']:,} numbers and more"
    flat = {**report, **report["packages"], "packing": packed if packing["dtypes"] else "none: the CPU cannot"}
    return "\n".join(f"{key:16} {value}" for key, value in flat.items() if key != "packages")
