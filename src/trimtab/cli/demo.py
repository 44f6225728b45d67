"""`trimtab demo`: the whole path on text that every Python has."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.files import check_writable
from trimtab.options import option

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options:
    """Flags of `trimtab demo`."""

    out: str = option("demo-out", "folder for the models, data, results.json and report.html", metavar="DIR")
    seed: int = option(0, "everything is made from it")


def run(options: Options) -> dict[str, Any]:
    """Run the demo."""
    check_writable(options.out, folder=True)
    # Threads that spin at barriers burn each other's time slices when anything else runs: 50 times slower was seen.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trimtab.demo.run import run_demo
    from trimtab.models.loading import quiet_loading

    quiet_loading()
    return {"out": options.out, **run_demo(Path(options.out), options.seed)}


def render(report: dict[str, Any]) -> str:
    """The table, and where to look next."""
    names = {
        "proposal": "proposal alone",
        "proposal_tempered": "proposal at its best temperature",
        "aligner": "aligner alone",
        "sft_aligner": "SFT aligner alone",
        "start_aligned": "unaligned start, geometric",
        "sft_aligned": "SFT aligner, geometric",
        "aligned": "aligned: product",
    }
    lines = [f"{report['sequences']} held-out docstrings, {report['tokens']} tokens; nats per token, 95 % interval", ""]
    for name, label in names.items():
        low, high = report["nll_interval"][name]
        lines.append(f"{label:34}{report['nll'][name]:8.3f}  [{low:.3f}, {high:.3f}]")
    ratio = report["speed"]["ratio_to_proposal_hf"]["aligned_speculative"]
    out = report["out"]
    lines += [
        "",
        f"aligned text at batch 1: {ratio:.2f} × the speed of `generate` of the proposal alone",
        f"{report['seconds']:.0f} seconds on {report['hardware']}",
        "",
        f"open {out}/report.html, or go on:",
        f"  trimtab score --proposal {out}/proposal --aligner {out}/aligner --dataset {out}/data/held_out.jsonl",
        f"  trimtab generate --proposal {out}/proposal --aligner {out}/aligner --prompt 'def add(a, b):'",
    ]
    return "\n".join(lines)
