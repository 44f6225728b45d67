"""The page of a loop: the curve of its rounds, and what was decided of each."""

from collections.abc import Mapping
from html import escape
from typing import Any

from trimtab.evaluate.charts import Point, frontier_chart
from trimtab.evaluate.page import html_page

__all__ = ["render_page"]

STYLE = "table { width: 100%; } td.why { text-align: left; } tr.served { font-weight: 600; } figure { max-width: 40rem; }"
NAMES = {"votes_since_start": "people's votes", "answers_since_start": "answers, by the reward"}


def render_page(history: Mapping[str, Any]) -> str:
    """One HTML file that opens without a network.

    Args:
        history: what `history.json` holds.
    """
    rounds, current = history["rounds"], history["current"]
    served = f"round {current}" if current else (history.get("aligner") or "the proposal alone")
    points = [
        Point(
            NAMES[name],
            float(one["round"]),
            one[name]["won"],
            one[name]["interval"][0],
            one[name]["interval"][1],
            marked=one["promoted"],
        )
        for one in rounds
        for name in NAMES
        if name in one
    ]
    chart = frontier_chart(points, "round", "won against what the loop began with", level=0.5)
    rows = "".join(_row(one, current) for one in reversed(rounds))
    backs = "".join(
        f"<li>from round {one['from']} to round {one['to']}, {escape(one['time'])}</li>" for one in history["rollbacks"]
    )
    body = (
        f"<h1>Loop over {escape(str(history['proposal']))}</h1><p>In service: <strong>{escape(served)}</strong>. "
        f"{len(rounds)} rounds, {sum(one['promoted'] for one in rounds)} of them promoted.</p>"
        f"<figure>{chart}<figcaption>The share of held-out prompts that a round's aligner wins against what the loop began"
        " with, with 95 % intervals; rings are rounds that were promoted. At a half it is no better.</figcaption></figure>"
        "<table><thead><tr><th>round</th><th>from</th><th>pairs</th><th>drawn</th><th>won against the incumbent</th><th>verdict"
        f"</th></tr></thead><tbody>{rows}</tbody></table>{f'<h2>Rolled back</h2><ul>{backs}</ul>' if backs else ''}"
    )
    return html_page("The curve of rounds", body, style=STYLE)


def _row(one: Mapping[str, Any], current: int) -> str:
    judged = one.get("votes") or one["answers"]
    low, high = judged["interval"]
    cells = (one["round"], one["incumbent"] or "start", one["pairs"]["train"]["pairs"], one["drawn"])
    return (
        f"<tr{' class=served' if one['round'] == current else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}"
        f"<td>{judged['won']:.3f} [{low:.3f}, {high:.3f}]</td><td class=why>{escape(one['why'])}</td></tr>"
    )
