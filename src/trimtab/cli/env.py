"""`trimtab env`: versions and hardware, and what this machine decides about the arithmetic."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options:
    """`trimtab env` has no flags of its own."""


def run(options: Options) -> dict[str, Any]:
    """Look around."""
    from trimtab.models.environment import describe_environment

    return describe_environment()


def render(report: dict[str, Any]) -> str:
    """One fact a line."""
    packing = report["packing"]
    packed = f"{' and '.join(packing['dtypes'])} weights of {packing['from_numbers']:,} numbers and more"
    flat = {**report, **report["packages"], "packing": packed if packing["dtypes"] else "none: the CPU cannot"}
    return "\n".join(f"{key:16} {value}" for key, value in flat.items() if key != "packages")
