"""The study's tables as Markdown: python benchmarks/real/report.py OUT

Intervals are 95 % bootstraps over prompts; a prompt that several seeds answer counts as one, and prompts of one group (a town,
a conversation's first turn) stay together. Differences are paired, of means over seeds.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rivals import PROPOSAL, RIVALS, SIX

from trimtab.evaluate.intervals import ratio_interval
from trimtab.evaluate.texts import describe_texts, distinct_at_equal_length
from trimtab.files import read_json

__all__ = ["Results", "Sums", "minus", "pooled", "ratio", "render", "shown", "table"]

Sums = dict[tuple[str, int], tuple[float, float]]
"""By a prompt's group and its place in the cell: a sum, and what to divide it by."""


class Results:
    """The cells of a task.

    Args:
        cells: what `measure` gave, with `system` and `seed`.
    """

    def __init__(self, cells: Iterable[Mapping[str, Any]]) -> None:
        self.by_system: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
        for cell in cells:
            self.by_system[cell["system"]][cell["seed"]] = cell

    def sums(self, system: str, part: str, values: str, sizes: str | None = None) -> list[Sums]:
        """One for each seed, of a test set's values; empty where they were not measured."""
        found = []
        for cell in self.by_system.get(system, {}).values():
            measured = cell["parts"].get(part, {})
            if values in measured:
                of = measured[sizes] if sizes else [1.0] * len(measured[values])
                keys = zip(measured["prompts"], range(len(of)), strict=True)
                found.append(dict(zip(keys, zip(map(float, measured[values]), of, strict=True), strict=True)))
        return found


def pooled(seeds: Iterable[Sums]) -> Sums:
    """All seeds as one."""
    total: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for sums in seeds:
        for key, (value, size) in sums.items():
            total[key][0] += value
            total[key][1] += size
    return {key: (value, size) for key, (value, size) in total.items()}


def minus(one: Sequence[Sums], other: Sequence[Sums]) -> Sums:
    """The first system's sums less the second's, at their means over seeds; sizes are the first's, which are the second's."""
    ours, theirs = pooled(one), pooled(other)
    return {
        key: (ours[key][0] / len(one) - theirs[key][0] / len(other), ours[key][1] / len(one))
        for key in ours.keys() & theirs.keys()
    }


def ratio(sums: Sums) -> tuple[float, tuple[float, float]]:
    """Σ / Σ and its interval, groups resampled."""
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (group, _), (value, size) in sorted(sums.items()):
        groups[group][0] += value
        groups[group][1] += size
    totals, sizes = torch.tensor(list(groups.values()), dtype=torch.float64).unbind(1)
    return float(totals.sum() / sizes.sum()), ratio_interval(totals, sizes)


def render(results: Results, part: str) -> str:
    """The tables of a test set."""
    systems = [name for name, cells in results.by_system.items() if any(part in cell["parts"] for cell in cells.values())]
    blocks = [_likelihood(results, systems, part), _texts(results, systems, part)]
    if part == "test":
        blocks += [_rewards(results, systems), _kinds(results, systems), _costs(results, systems)]
    return "\n\n".join(block for block in blocks if block)


def shown(value: tuple[float, tuple[float, float]], form: str = ".3f") -> str:
    """A ratio with its interval."""
    mean, (low, high) = value
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _cell(sums: Sums, form: str = ".3f") -> str:
    return shown(ratio(sums), form) if sums else "–"


def _apart(results: Results, name: str, anchor: str, *of: str) -> str:
    """How much more a system has than an anchor."""
    ours, theirs = results.sums(name, *of), results.sums(anchor, *of)
    return _cell(minus(ours, theirs), "+.3f") if ours and theirs and name != anchor else "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of Markdown under a head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _likelihood(results: Results, systems: Sequence[str], part: str) -> str:
    """NLL of wanted answers, the least first."""
    found = {name: sums for name in systems if (sums := results.sums(name, part, "nll", "tokens"))}
    rows = []
    for name in sorted(found, key=lambda name: ratio(pooled(found[name]))[0]):
        apart = [_apart(results, name, anchor, part, "nll", "tokens") for anchor in (PROPOSAL, SIX)]
        each = " ".join(f"{ratio(sums)[0]:.3f}" for sums in found[name])
        rows.append([name, _cell(pooled(found[name])), *apart, each])
    head = ["system", "NLL, nats a token", f"minus {PROPOSAL}", f"minus {SIX}", "by seed"]
    return table(head, rows) if rows else ""


SPEED = ("tokens_per_second", "ratio_to_transformers", "ratio_prompts_read_whole")
"""Columns of speed."""
MEASURES = {"rougeL": "ROUGE-L", "chrf": "chrF", "obeyed": "obeyed", "right": "right"}


def _texts(results: Results, systems: Sequence[str], part: str) -> str:
    """What greedy answers are like."""
    first = {name: next(iter(results.by_system[name].values()))["parts"][part] for name in systems}
    distinct = distinct_at_equal_length({name: one["answers"] for name, one in first.items()})
    measures = [measure for measure in MEASURES if any(measure in one for one in first.values())]
    head = [title for measure in measures for title in (MEASURES[measure], f"minus {SIX}")]
    head = ["system", *head, "words", "distinct-2", "repetition", "cut"]
    rows = []
    for name in systems:
        line = [name]
        for measure in measures:
            line += [_cell(pooled(results.sums(name, part, measure))), _apart(results, name, SIX, part, measure)]
        about = describe_texts(first[name]["answers"], first[name]["finish_reasons"])
        figures = (about["mean_words"], distinct[name]["distinct_2"], about["repetition_4"], about["truncated"])
        rows.append([*line, *("–" if figure is None else f"{figure:.2f}" for figure in figures)])
    return table(head, rows)


def _rewards(results: Results, systems: Sequence[str]) -> str:
    """Accuracy of the implicit reward log P_θ − log P_M on pairs, of sums as DPO's papers have it, and of means over tokens."""
    base = results.by_system.get(PROPOSAL, {})
    if not base or "rejected" not in next(iter(base.values()))["parts"]["test"]:
        return ""
    reference = next(iter(base.values()))["parts"]["test"]
    rows = []
    for name in systems:
        cells = [cell["parts"]["test"] for cell in results.by_system[name].values()]
        if name != PROPOSAL and "rejected" in cells[0]:
            rows.append([name, *(_cell(pooled(_won(one, reference, mean) for one in cells)) for mean in (False, True))])
    return table(["system", "reward accuracy", "of means over tokens"], rows) if rows else ""


def _won(one: Mapping[str, Any], reference: Mapping[str, Any], mean: bool) -> Sums:
    """Whether each wanted answer has the higher reward: 1, 0, or a half."""
    found: Sums = {}
    for i, group in enumerate(one["prompts"]):
        rewards = []
        for values, sizes in (("nll", "tokens"), ("rejected", "rejected_tokens")):
            reward = reference[values][i] - one[values][i]
            rewards.append(reward / one[sizes][i] if mean else reward)
        chosen, rejected = rewards
        found[group, i] = (0.5 if chosen == rejected else float(chosen > rejected), 1.0)
    return found


def _kinds(results: Results, systems: Sequence[str]) -> str:
    """The share obeyed of each kind of constraint."""
    rows, kinds = [], []
    for name in systems:
        shares: dict[str, list[bool]] = defaultdict(list)
        for cell in results.by_system[name].values():
            for kind, kept in zip(cell["parts"]["test"].get("kinds", ()), cell["parts"]["test"].get("obeyed", ()), strict=True):
                shares[kind].append(kept)
        kinds = sorted(shares) or kinds
        if shares:
            rows.append([name, *(f"{sum(shares[kind]) / len(shares[kind]):.2f}" for kind in kinds)])
    return table(["obeyed, by kind", *kinds], rows) if rows else ""


def _costs(results: Results, systems: Sequence[str]) -> str:
    """Divergence, harm, training and speed: means over seeds."""

    def mean(name: str, of: Callable[[Mapping[str, Any]], float | None], form: str) -> str:
        values = [value for cell in results.by_system[name].values() if (value := of(cell)) is not None]
        return f"{sum(values) / len(values):{form}}" if values else "–"

    head = ["system", "KL, nats a token", "outside the task, nats lost", "seconds of training", "of its drafter", "MB"]
    head += ["tokens a second", "ratio to `generate`", "prompts read whole"]
    rows = []
    for name in systems:
        cells = results.by_system[name].values()
        kl = pooled(dict(_numbered(cell["kl"]["kl"], cell["kl"]["tokens"])) for cell in cells)
        harm = pooled(dict(_harm(cell["outside"])) for cell in cells if cell["outside"])
        training = [mean(name, lambda c, k=k: c["training"] and c["training"][k], ".0f") for k in ("seconds", "draft_seconds")]
        size = mean(name, lambda c: c["training"] and c["training"]["bytes"] / 1e6, ".1f")
        speed = [mean(name, lambda c, k=k: c["speed"].get(k), ".2f") for k in SPEED]
        bound = "≤ " * any(cell["kl"]["bound"] for cell in cells)
        rows.append([name, bound + _cell(kl), _cell(harm, "+.3f"), *training, size, *speed])
    return f"{table(head, rows)}\n\n{_machines(results, systems)}"


def _machines(results: Results, systems: Sequence[str]) -> str:
    """What each system was measured on, with its seeds where it was not one machine for all of them."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in systems:
        seeds: dict[str, list[str]] = defaultdict(list)
        for seed, cell in results.by_system[name].items():
            seeds[cell.get("hardware", "a machine that is not on record")].append(str(seed))
        for machine, of in seeds.items():
            found[machine].append(name if len(seeds) == 1 else f"{name} (seed {', '.join(of)})")
    return "\n".join(f"- Measured on {machine}: {'; '.join(of)}." for machine, of in found.items())


def _numbered(values: Sequence[float], sizes: Sequence[int]) -> Iterable[tuple[tuple[str, int], tuple[float, float]]]:
    return (((str(i), i), (value, size)) for i, (value, size) in enumerate(zip(values, sizes, strict=True)))


def _harm(outside: Mapping[str, Any]) -> Iterable[tuple[tuple[str, int], tuple[float, float]]]:
    lost = [own - base for own, base in zip(outside["nll"], outside["proposal_nll"], strict=True)]
    return _numbered(lost, outside["tokens"])


def main(out: Path) -> None:
    for folder in sorted(path for path in out.glob("*/results") if path.is_dir()):
        order = {name: i for i, name in enumerate(RIVALS)}
        cells = [read_json(path) for path in sorted(folder.glob("*.json"))]
        cells.sort(key=lambda cell: (order.get(cell["system"], len(order)), cell["seed"]))
        results = Results(cells)
        seeds = sorted({cell["seed"] for cell in cells})
        print(f"## {cells[0]['task'].capitalize()} (seeds {', '.join(map(str, seeds))})\n")
        for part in dict.fromkeys(part for cell in cells for part in cell["parts"]):
            print("" if part == "test" else "### Of other packages, never learnt from\n\n", end="")
            print(render(results, part), end="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
