"""The study's tables, over all seeds: python benchmarks/quality/report.py OUT

Intervals are 95 % bootstraps over prompts; a prompt that several seeds hold out counts as one. Differences are paired.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from aligners import MAIN, SECOND
from cell import REGIMES

from trimtab.evaluate.intervals import ratio_interval
from trimtab.files import read_json

ANCHORS = {"default": MAIN, "second round": SECOND}
"""What every system is compared with, pair by pair."""

Pairs = Iterable[tuple[str, float, float]]
"""For each prompt: its name, a sum, and what to divide by."""


def main(out: Path) -> None:
    for regime in REGIMES:
        folders = [path.parent for path in sorted(out.glob(f"*/{regime}/costs.json"))]
        if folders:
            print(f"## {regime.capitalize()} proposal ({len(folders)} seeds)\n")
            print_nll([read_json(folder / "nll.json") for folder in folders])
            print_wins([read_json(folder / "wins.json") for folder in folders])
            print_costs([read_json(folder / "costs.json") for folder in folders])


def ratio(pairs: Pairs) -> tuple[float, tuple[float, float]]:
    """A pooled ratio and its interval."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, total, size in pairs:
        sums[name][0] += total
        sums[name][1] += size
    totals, sizes = torch.tensor(list(sums.values()), dtype=torch.float64).unbind(1)
    return float(totals.sum() / sizes.sum()), ratio_interval(totals, sizes)


def shown(value: tuple[float, tuple[float, float]], form: str = ".3f") -> str:
    """A ratio with its interval."""
    mean, (low, high) = value
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def print_nll(cells: Sequence[dict[str, Any]]) -> None:
    """Likelihood of held-out wanted answers."""
    rows = []
    for name in _names(cell["systems"] for cell in cells):
        having = [cell for cell in cells if name in cell["systems"]]
        own: list[tuple[str, float, float]] = []
        for cell in having:
            own += zip(cell["prompts"], cell["systems"][name]["nll"], cell["tokens"], strict=True)
        columns = [shown(ratio(own))]
        for anchor in ANCHORS.values():
            apart: list[tuple[str, float, float]] = []
            for cell in having:
                if (best := cell["systems"].get(f"{anchor}, strength 1")) is not None:
                    both = zip(cell["prompts"], best["nll"], cell["systems"][name]["nll"], cell["tokens"], strict=True)
                    apart += [(p, b - a, n) for p, a, b, n in both]
            columns.append(shown(ratio(apart), "+.3f") if apart else "–")
        columns.append("; ".join(_settings(cell["systems"][name]) for cell in having))
        rows.append((ratio(own), f"| {name} | {' | '.join(columns)} |"))
    minus = " | ".join(f"minus {name}" for name in ANCHORS)
    print(f"| system | NLL, nats a token | {minus} | weights and proposal's T, by seed |\n|---|---|---|---|---|")
    print("\n".join(line for _, line in sorted(rows)), end="\n\n")


def _names(cells: Iterable[dict[str, Any]]) -> list[str]:
    """Of all systems, in order; not every cell may have each."""
    return list(dict.fromkeys(name for cell in cells for name in cell))


def _settings(system: dict[str, Any]) -> str:
    weights = " ".join(f"{weight:.3g}" for weight in system["weights"])
    temperature = system["proposal_temperature"]
    return ", ".join(part for part in (weights, f"T {temperature:.3g}" if temperature != 1 else "") if part) or "–"


def print_wins(cells: Sequence[dict[str, Any]]) -> None:
    """Win rates against the proposal."""
    judged = ratio((p, a, 1.0) for cell in cells for p, a in zip(cell["judged_prompts"], cell["judge"], strict=True))
    print(f"The judge agrees with {shown(judged, '.2f')} of held-out pairs of real answers.\n")
    minus = " | ".join(f"{name} minus it" for name in ANCHORS)
    head = f"| system | KL, nats a token | win rate | {minus} | distinct pairs | repeats | ended | strength |\n|{'---|' * 9}"
    for label in dict.fromkeys(label for cell in cells for label, held in cell["matched"].items() if held):
        targets = ", ".join(f"{cell['targets'][label]:.3f}" for cell in cells if cell["matched"][label])
        print(f"At KL {targets} (by seed):\n\n{head}")
        _print_matched(cells, lambda cell, label=label: cell["matched"][label])
    print(f"As they are:\n\n{head}")
    _print_matched(cells, lambda cell: cell["fixed"])


def _print_matched(cells: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = []
    for name in _names(map(of, cells)):
        won: list[tuple[str, float, float]] = []
        moved: list[tuple[str, float, float]] = []
        apart: dict[str, list[tuple[str, float, float]]] = {anchor: [] for anchor in ANCHORS.values()}
        having = [cell for cell in cells if name in of(cell)]
        for cell in having:
            held = of(cell)[name]
            won += [(p, w, 1.0) for p, w in zip(cell["prompts"], held["wins"], strict=True)]
            moved += zip(cell["prompts"], held["kl"], held["tokens"], strict=True)
            for anchor, pairs in apart.items():
                if (best := of(cell).get(anchor)) is not None:
                    pairs += [(p, m - w, 1.0) for p, m, w in zip(cell["prompts"], best["wins"], held["wins"], strict=True)]
        means = [sum(of(cell)[name][key] for cell in having) / len(having) for key in ("distinct_pairs", "repeats", "ended")]
        strengths = " ".join(f"{of(cell)[name]['strength']:.3g}" for cell in having if "strength" in of(cell)[name]) or "–"
        line = [shown(ratio(moved)), shown(ratio(won))]
        line += [shown(ratio(pairs), "+.3f") if pairs else "–" for pairs in apart.values()]
        rows.append((-ratio(won)[0], f"| {name} | {' | '.join(line + [f'{mean:.2f}' for mean in means])} | {strengths} |"))
    print("\n".join(line for _, line in sorted(rows)), end="\n\n")


def print_costs(cells: Sequence[dict[str, Any]]) -> None:
    """Seconds, bytes and acceptance, averaged over seeds."""
    print("| trained | seconds, at one rate | bytes |\n|---|---|---|")
    for name in _names(cell["costs"] for cell in cells):
        found = [cell["costs"][name] for cell in cells if name in cell["costs"]]
        seconds, size = (sum(cost[key] for cost in found) / len(found) for key in ("seconds", "bytes"))
        print(f"| {name} | {seconds:.0f} | {size / 1e6:.2f} MB |")
    print(f"\nThe proposal has {cells[0]['proposal_bytes'] / 1e6:.2f} MB.\n")
    drafters = list(next(iter(cells[0]["acceptance"].values())))
    print(f"| drafts accepted on own samples | {' | '.join(drafters)} |\n|---|{'---|' * len(drafters)}")
    for name in _names(cell["acceptance"] for cell in cells):
        accepted = [cell["acceptance"][name] for cell in cells if name in cell["acceptance"]]
        means = [sum(one[who] for one in accepted) / len(accepted) for who in drafters]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in means)} |")
    print()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
