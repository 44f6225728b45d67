"""The study of gates as Markdown."""

from collections.abc import Mapping
from typing import Any

from report import table

__all__ = ["render"]


def render(report: Mapping[str, Any]) -> str:
    """All tables of `report.json`."""
    parts = [
        "## What is kept at half the calls",
        _half(report),
        "## NLL against the share of calls",
        _curves(report),
        "## Oracle and null oracle",
        _oracles(report),
        "## Where the gain is",
        _places(report),
        f"## Text ({report['prompts']} prompts)",
        _texts(report),
        "## Cost",
        _cost(report),
        f"Measured on {report['hardware']}.",
    ]
    return "\n\n".join(parts)


def _half(report: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            "yes" if name in report["asks"] else "no",
            _figure(found["half"]["share"], 2),
            _figure(found["half"]["kept"], 3),
            f"{found['enough']['goal']:.2f}",
            _figure(found["enough"]["share"], 2),
            _figure(found["enough"]["kept"], 3),
        )
        for name, found in report["half"].items()
    ]
    head = ("gate", "asks the aligner", "calls", "gain kept", "calls for 90 % on dev", "on test", "kept there")
    return table(head, rows)


def _curves(report: Mapping[str, Any]) -> str:
    nll = report["nll"]
    said = ", ".join(f"{name} {_figure(nll[name], 3)}" for name in ("proposal", "rule", "other"))
    rows = [
        (name, f"{point['tau']:g}", f"{point['goal']:g}", *(_figure(point[key], 3) for key in ("share", "nll", "kept")))
        for name, points in report["curves"].items()
        for point in points
    ]
    tokens = ", ".join(f"{count} of {part}" for part, count in report["tokens"].items())
    curves = table(("gate", "threshold", "calls on dev", "calls", "NLL, nats a token", "gain kept"), rows)
    return f"Tokens: {tokens}. The rule is {report['rule']}. NLL: {said}.\n\n{curves}"


def _oracles(report: Mapping[str, Any]) -> str:
    found = report["oracles"]
    shares = next(iter(found.values()))["below"]
    rows = [
        (name, *(_figure(one["below"][share], 3, sign=True) for share in shares), _figure(one["best"], 3, sign=True),
         f"{one['best_share']:.2f}")
        for name, one in found.items()
    ]  # fmt: skip
    return table(("nats a token below the rule, at calls", *shares, "at the best share", "which is"), rows)


def _places(report: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{one['share']:.3f}", _figure(one["of_gain"], 3), "–" if one["gain"] is None else f"{one['gain']:+.2f}")
        for name, one in report["places"].items()
    ]
    return table(("place in the answer", "share of tokens", "share of the gain", "gain, nats a token"), rows)


def _texts(report: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            *(_figure(one[key], digits) for key, digits in (("share", 2), ("calls", 1), ("tokens", 1))),
            f"{one['ended']:.2f}",
            _figure(one["rougeL"], 3),
            _figure(one["rougeL_minus_rule"], 3, sign=True) if name != "rule" else "–",
            _figure(one["chrf"], 3),
            _figure(one["chrf_minus_rule"], 3, sign=True) if name != "rule" else "–",
        )
        for name, one in report["texts"].items()
    ]
    head = (
        "gate, and its calls on dev",
        "calls",
        "calls an answer",
        "tokens an answer",
        "ended",
        "ROUGE-L",
        "minus rule",
        "chrF",
    )
    return table((*head, "minus rule"), rows)


def _cost(report: Mapping[str, Any]) -> str:
    cost = report["cost"]
    rows = [(name, f"{cost[name]:.1f}") for name in ("proposal", "rule", "gate")]
    rows += [(f"at best, {float(share):.0%} of the calls", f"{ms:.1f}") for share, ms in cost["floor"].items()]
    return table(("", "ms a token"), rows)


def _figure(value: Mapping[str, Any], digits: int, *, sign: bool = False) -> str:
    form = f"{'+' if sign else ''}.{digits}f"
    low, high = value["interval"]
    return f"{value['mean']:{form}} [{low:{form}}, {high:{form}}]"
