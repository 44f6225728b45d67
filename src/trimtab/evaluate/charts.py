"""Line charts as inline SVG, for reports that open without a network."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Line", "line_chart"]

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 34, 36
COLOURS = ("#2f6fd0", "#d9722b", "#3a9d6a", "#8a5cc7")


class Line(NamedTuple):
    """One named curve."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def line_chart(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Curves over one pair of axes, with a legend; points that are not finite, and empty curves, are left out."""
    lines = [line._replace(points=[p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return f'<svg viewBox="0 0 {WIDTH} 40"><text x="{LEFT}" y="24">nothing to draw</text></svg>'
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x_low, x_high = min(*xs, *x_ticks), max(*xs, *x_ticks)
    y_low, y_high = min(*ys, *y_ticks), max(*ys, *y_ticks)

    def x_at(value: float) -> float:
        return LEFT + (value - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / ((y_high - y_low) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">']
    for tick in y_ticks:
        y = f"{y_at(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".12"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{tick:g}</text>')
    y = f"{HEIGHT - BOTTOM + 15}"
    parts += [f'<text x="{x_at(tick):.1f}" y="{y}" text-anchor="middle">{tick:g}</text>' for tick in x_ticks]
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    place = float(LEFT)
    for line, colour in zip(lines, COLOURS, strict=False):
        points = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<line x1="{place}" x2="{place + 16}" y1="14" y2="14" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{place + 20}" y="14" dominant-baseline="middle">{escape(line.name)}</text>')
        place += 34 + 6.2 * len(line.name)
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that cover most of an interval."""
    if high <= low:
        return [low]
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
