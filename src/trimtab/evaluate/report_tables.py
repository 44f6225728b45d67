"""Numbers and tables as HTML, for the report: everything that comes in as text is escaped, what is missing is a dash."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple, TypeGuard

__all__ = ["MISSING", "Row", "by_system", "flat", "is_number", "number", "provenance_table", "table", "text", "with_interval"]

MISSING = "–"
SIGNIFICANT = 3
FEW = 5
"""Columns up to which a table is not drawn out to the width of the page, for the eye would lose the row."""
LABELS = {
    "mean_characters": "characters",
    "mean_words": "words",
    "empty": "empty, share",
    "truncated": "cut by the limit, share",
    "handed_over": "handed over, share",
    "tokens_before_handover": "tokens before the hand-over",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "distinct_1_at_equal_length": "distinct-1 at equal length",
    "distinct_2_at_equal_length": "distinct-2 at equal length",
    "distinct_3_at_equal_length": "distinct-3 at equal length",
    "repetition_4": "repetition-4",
    "kl_per_token": "KL from the proposal, nats per token",
    "kl_per_sequence": "KL from the proposal, nats per answer",
    "log_z_mean": "log Z, mean",
    "log_z_std": "log Z, standard deviation",
    "entropy": "entropy, nats per token",
    "influence": "influence, mean |log ratio| in nats",
    "nll": "NLL, nats per token",
    "nll_per_byte": "NLL, nats per byte",
    "acceptance": "drafts accepted, share",
}
"""Names of figures; others are spelled as their key, without underscores."""


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        name: HTML of its head.
        cells: HTML, numbers.
        kind: `"ours"` stands out, `"sub"` stands back.
    """

    name: str
    cells: Sequence[str]
    kind: str = ""


def text(value: object) -> str:
    """Anything as escaped text."""
    return MISSING if value is None else escape(str(value))


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, decimals: int | None = None) -> str:
    """A number with so many decimals, or about three significant digits; whole numbers are whole."""
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    shown = f"{value:,.{_decimals([value]) if decimals is None else decimals}f}"
    return shown.replace("-", "−")


def with_interval(value: Any, interval: Any, decimals: int | None = None) -> str:
    """A number above its interval, with as many decimals; without an interval, the number alone."""
    if decimals is None:
        decimals = _decimals([value])
    if not is_number(value) or not isinstance(interval, Sequence) or len(interval) != 2 or not all(map(is_number, interval)):
        return number(value, decimals)
    low, high = (number(bound, decimals) for bound in interval)
    return f"{number(value, decimals)}<small>[{low}, {high}]</small>"


def table(heads: Sequence[str], rows: Sequence[Row], label: str) -> str:
    """A table that scrolls in itself where the screen is narrow.

    Args:
        heads: texts: the first is that of the rows' names.
        rows: with one cell less than heads.
        label: a text that names it for those who do not see it.
    """
    first, *others = (escape(head) for head in heads)
    header = f'<th scope="col">{first}</th>' + "".join(f'<th scope="col" class="number">{head}</th>' for head in others)
    body = []
    for row in rows:
        kind = f' class="{row.kind}"' if row.kind else ""
        cells = "".join(f'<td class="number">{cell}</td>' for cell in row.cells)
        body.append(f'<tr{kind}><th scope="row">{row.name}</th>{cells}</tr>')
    width = "wide narrow" if len(heads) <= FEW else "wide"
    return (
        f'<div class="{width}" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def by_system(figures: Mapping[str, Any], first: Sequence[str], label: str) -> str:
    """Whatever numbers there are for each system: a row for each figure, a column for each system.

    Args:
        figures: by system, then by name, nested or not. `x_interval` goes with `x`; what is no number is left out.
        first: the systems that come first.
        label: see `table`.
    """
    systems = sorted(figures, key=lambda name: (first.index(name) if name in first else len(first), list(figures).index(name)))
    columns = [dict(flat(figures[name] or {})) for name in systems]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        values = [column.get(name) for column in columns]
        if name[-1].endswith("_interval") or not all(value is None or isinstance(value, (int, float)) for value in values):
            continue
        decimals = _decimals(values)
        intervals = [column.get((*name[:-1], f"{name[-1]}_interval")) for column in columns]
        cells = [with_interval(value, interval, decimals) for value, interval in zip(values, intervals, strict=True)]
        rows.append(Row(escape(", ".join(LABELS.get(part, part.replace("_", " ")) for part in name)), cells))
    return table(["", *systems], rows, label)


def provenance_table(provenance: Mapping[str, Any]) -> str:
    """Nested settings as paths and values."""
    rows = [
        f'<tr><th scope="row">{escape(" › ".join(path))}</th><td><code>{_leaf(leaf)}</code></td></tr>'
        for path, leaf in flat(provenance)
    ]
    return f'<div class="wide" tabindex="0" role="region" aria-label="Provenance"><table>{"".join(rows)}</table></div>'


def flat(nested: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and what they lead to; a list is a leaf unless it holds mappings."""
    for key, value in nested.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            yield from flat(value, here)
        elif isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) for one in value):
            yield from flat({str(i + 1): one for i, one in enumerate(value)}, here)
        else:
            yield here, value


def _leaf(value: Any) -> str:
    return ", ".join(map(text, value)) if isinstance(value, (list, tuple)) else text(value)


def _decimals(values: Sequence[Any]) -> int:
    """How many decimals show the largest of some numbers with three significant digits, for all of them alike."""
    finite = [abs(value) for value in values if is_number(value)]
    if all(float(value).is_integer() and isinstance(value, int) for value in finite) or max(finite) >= 1000:
        return 0
    largest = max(finite)
    return min(max(SIGNIFICANT - 1 - math.floor(math.log10(largest)), 1), 6) if largest > 0 else 0
