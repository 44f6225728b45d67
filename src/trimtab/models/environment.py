"""What a measurement depends on beside its options: versions, hardware, and what this machine decides about the arithmetic."""

import platform
import sys
from importlib import metadata
from typing import Any

from trimtab import __version__
from trimtab.hardware import describe_hardware
from trimtab.models.prepack import PACKED_FROM, packed_dtypes

__all__ = ["describe_environment"]

PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "datasets", "huggingface_hub")


def describe_environment() -> dict[str, Any]:
    """All of it, as JSON."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    system = {"python": sys.version.split()[0], "platform": platform.platform()}
    packing = {"dtypes": packed_dtypes(), "from_numbers": PACKED_FROM}
    return {"trimtab": __version__, **system, "packages": packages, "hardware": describe_hardware(), "packing": packing}
