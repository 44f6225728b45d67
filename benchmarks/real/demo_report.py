"""The page that the demo on a real model leaves: what everybody said, side by side, and how far that is from what is wanted."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trimtab.evaluate.charts import Line, line_chart
from trimtab.evaluate.page import html_page
from trimtab.files import atomic_write

__all__ = ["verdict", "write_report"]

SYSTEMS = {
    "proposal": ("the model", "as it is"),
    "six examples": ("with six examples", "in every prompt"),
    "aligned": ("aligned", "no example"),
}
METRICS = {"nll": "likelihood", "rougeL": "ROUGE-L", "chrf": "chrF"}
STYLE = """
.answers { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; margin-top: .8rem; }
.answers h3 { font-size: .85rem; margin: 0; color: var(--soft); font-weight: 400; }
.answers .ours pre { font-weight: 600; } .real { color: var(--soft); margin: .4rem 0 0; }
td:first-child { white-space: nowrap; } .charts { max-width: 30rem; }
@media (max-width: 40rem) { .answers { grid-template-columns: 1fr; } }
"""


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the page of what `report.json` holds."""
    parts = [
        "<h1>A real model, aligned in minutes</h1>",
        _introduction(report),
        "<h2>What they say</h2>",
        f'<p class="note">The first functions of the held-out file: nobody picked them. Greedy answers of at most'
        f" {report['max_tokens']} tokens; what was cut ends in dots.</p>",
        *(_card(item) for item in report["shown"]),
        "<h2>How far from the real docstrings</h2>",
        _table(report),
        "<h2>Training</h2>",
        _chart(report["history"]),
        "<h2>Speed</h2>",
        f"<p>One answer at a time, the aligned model writes {report['speed']['tokens_per_second']:.1f} tokens a second:"
        f" {report['speed']['ratio_to_transformers']:.2f} × the speed of transformers' <code>generate</code> of the model"
        " alone, both in float32. The two took turns in this run. What prompts begin with alike is read once;"
        f" with every prompt read whole it is {report['speed']['ratio_prompts_read_whole']:.2f} ×.</p>",
        "<h2>This run</h2>",
        _times(report),
    ]
    with atomic_write(path) as stream:
        stream.write(html_page("Trimtab on a real model", "\n".join(parts), style=STYLE))


def _introduction(report: Mapping[str, Any]) -> str:
    head, gains, seconds = report["head"], report["gains"], report["seconds"]["train the head"]
    return (
        f"<p>{escape(report['model'])} is asked for the docstring of a Python function. The model stays as it is. Its"
        f" aligner is a <i>head</i>, which runs the last {head['layers']} of its {head['proposal_layers']} layers again,"
        f" with an adapter of {head['bytes'] / 1e6:.1f} MB. It was trained in {seconds:.0f} seconds, on {head['learnt_from']}"
        " docstrings of the standard library.</p>"
        f"<p>Judged on {report['prompts']} functions of modules from which nothing was learnt. Against the model as it is, the"
        f" aligned model is {verdict(gains['proposal'])}. Against the model with six examples in every prompt, it is"
        f" {verdict(gains['six examples'])}.</p>"
    )


def verdict(gains: Mapping[str, Any]) -> str:
    """In which figures the aligned model is better, worse, or neither: clear is an interval without zero."""
    found: dict[str, list[str]] = {"clearly better": [], "clearly worse": [], "not clearly different": []}
    for name, label in METRICS.items():
        low, high = gains[name]["interval"]
        if low <= 0 <= high:
            found["not clearly different"].append(label)
        else:
            found["clearly better" if (high < 0) == (name == "nll") else "clearly worse"].append(label)
    return ", ".join(f"<b>{words}</b> in {_listed(names)}" for words, names in found.items() if names)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _card(item: Mapping[str, Any]) -> str:
    answers = "".join(
        f"<div{_ours(name)}><h3>{label}</h3><pre>{escape(item['answers'][name]) or '<i>nothing</i>'}</pre></div>"
        for name, (label, _) in SYSTEMS.items()
    )
    real = f'<p class="real">In the library: {escape(item["real"])}</p>'
    return f'<div class="card"><pre>{escape(item["asked"])}</pre>{real}<div class="answers">{answers}</div></div>'


def _table(report: Mapping[str, Any]) -> str:
    rows = []
    for name, (label, note) in SYSTEMS.items():
        figures, gains = report["systems"][name], report["gains"].get(name)
        cells = [
            f"{_figure(figures[metric])}{f'<small>{_figure(gains[metric], sign=True)}</small>' if gains else ''}"
            for metric in METRICS
        ]
        cells += [f"{figures['ended']:.0%}", f"{figures['prompt_tokens']:.0f}"]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr{_ours(name)}><td>{label}<small>{note}</small></td>{numbers}</tr>")
    heads = ["nats per token", "ROUGE-L", "chrF", "ends", "prompt"]
    header = "".join(f'<th class="number">{head}</th>' for head in heads)
    return (
        f'<div class="wide"><table><tr><th></th>{header}</tr>{"".join(rows)}</table></div>'
        '<p class="note">Nats per token: how much the real docstring surprises the model; lower is better. ROUGE-L and chrF:'
        " what the answer has in common with it, from 0 to 1; higher is better. In brackets: 95 % bootstrap intervals over"
        " prompts. In small type: the aligned model's figure less this one, prompt by prompt. Ends: the share of answers that"
        " end by themselves. Prompt: its tokens, which are read at every request.</p>"
    )


def _chart(history: Sequence[Mapping[str, Any]]) -> str:
    looks = [row for row in history if "eval_nll_aligned" in row]
    start = float(looks[0]["eval_nll_proposal"])
    steps = [float(row["step"]) for row in looks]
    curve = [(0.0, start), *((step, float(row["eval_nll_aligned"])) for step, row in zip(steps, looks, strict=True))]
    lines = [Line("aligned", curve), Line("the model", [(0.0, start), (steps[-1], start)], dashed=True)]
    caption = "Development prompts while training, nats per token. A head starts at the model itself."
    svg = line_chart(lines, "step", "nats per token")
    return f'<div class="charts"><figure>{svg}<figcaption>{caption}</figcaption></figure></div>'


def _times(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{escape(part)}</td><td class="number">{seconds:.0f}</td>'
        f'<td class="number">{report["cpu_seconds"][part]:.0f}</td></tr>'
        for part, seconds in report["seconds"].items()
    )
    total = sum(report["seconds"].values())
    return (
        f"<p>{total:.0f} seconds on {escape(report['hardware'])}.</p>"
        '<div class="wide"><table><tr><th>part</th><th class="number">seconds</th><th class="number">of all cores</th></tr>'
        f"{rows}</table></div>"
    )


def _ours(name: str) -> str:
    return ' class="ours"' if name == "aligned" else ""


def _figure(found: Mapping[str, Any], *, sign: bool = False) -> str:
    mean, low, high = (f"{value:{'+' if sign else ''}.2f}".replace("-", "−") for value in (found["mean"], *found["interval"]))
    return f"{mean} [{low}, {high}]"
