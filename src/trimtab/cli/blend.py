"""`trimtab blend`: several aligners as one, by arithmetic on their weights."""

from dataclasses import dataclass
from typing import Any

from trimtab.blend.options import BlendOptions

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options(BlendOptions):
    """Flags of `trimtab blend`."""


def run(options: Options) -> dict[str, Any]:
    """Check, add up, write."""
    from trimtab.blend.run import run as write
    from trimtab.models.loading import quiet_loading

    quiet_loading()
    return write(options)


def render(report: dict[str, Any]) -> str:
    """What was written, and of what."""
    size = f"rank {report['rank']}" if report["kind"] == "lora" else f"{report['parameters']:,} parameters"
    lines = [f"blend in {report['out']}: {'a LoRA adapter' if report['kind'] == 'lora' else 'a whole model'}, {size}", ""]
    lines.append(f"{'base':16}{report['parts']['base']['id']}")
    lines += [f"{name:16}{part['id']} × {part['weight']:g}" for name, part in report["parts"]["vectors"].items()]
    weight = "its default weight" if report["weight"] is None else f"weight {report['weight']:g}"
    return "\n".join([*lines, f"{'decoded by':16}{report['rule']}, {weight}"])
