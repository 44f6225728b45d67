"""What gates keep of an aligner's gain, by the share of its calls: thresholds from some tokens, figures on others.

The gain at a token is log rule − log p̃ of the wanted token, in nats. A gate takes it where it is open and leaves it elsewhere,
so it *keeps* a part of the whole; one that opens blindly keeps as much as it opens. The oracle opens where the gain is largest.
It may choose at each token, and choosing lowers the minimum by itself: the null oracle makes as many choices between the rule
and the rule with another, equally strong aligner, which has nothing to teach.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from gate_learned import Logit
from gate_rows import ROW
from torch import Tensor

from trimtab.evaluate.intervals import ratio_interval

__all__ = [
    "ENOUGH",
    "ORACLE",
    "SHARES",
    "Signal",
    "at_threshold",
    "curve",
    "gain",
    "half",
    "mean",
    "oracles",
    "places",
    "signals",
]

Table = Mapping[str, Tensor]
"""Columns of `read_columns`, float64 `[N]`."""

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
ENOUGH = 0.9
"""Of the gain: what a gate must keep to be called good."""
ORACLE = "oracle"
PLACES = {"first token": (0, 1), "second": (1, 2), "3 to 5": (2, 5), "6 to 10": (5, 10), "later": (10, 10**9)}


class Signal(NamedTuple):
    """What a gate goes by.

    Attributes:
        name: of the gate.
        read: the signal `[N]` of tokens.
        above: whether it is open at the threshold and above, or at the threshold and below.
        asks: whether the aligner must be asked to know it.
    """

    name: str
    read: Callable[[Table], Tensor]
    above: bool
    asks: bool = False

    def opens(self, table: Table, tau: float) -> Tensor:
        """Where the gate is open, `[N]`."""
        value = self.read(table)
        return value >= tau if self.above else value <= tau

    def threshold(self, table: Table, share: float) -> float:
        """The threshold at which it opens for about this share of tokens, in four digits, as one would write it."""
        return float(f"{self.read(table).quantile(1 - share if self.above else share).item():.4g}")

    def share_for(self, table: Table, kept: float) -> float:
        """The smallest share of tokens, by descending worth of a call to the gate, that keeps so much of the gain."""
        value = self.read(table)
        order = (-value if self.above else value).argsort(stable=True)
        sums = gain(table)[order].cumsum(0) / gain(table).sum()
        return (int((sums >= kept).nonzero()[0]) + 1) / len(value)


def signals(logit: Logit) -> list[Signal]:
    """All gates of the study but the null oracle's."""
    return [
        Signal("entropy", lambda table: table["entropy"], above=True),
        Signal("max_p", lambda table: table["best"].exp(), above=False),
        Signal("first tokens", lambda table: table["position"], above=False),
        Signal("learned", lambda table: logit([table[name] for name in ROW], table["position"]), above=True),
        Signal("kl past tau", lambda table: table["kl"], above=True, asks=True),
        Signal("kl up to tau", lambda table: table["kl"], above=False, asks=True),
        Signal(ORACLE, gain, above=True, asks=True),
    ]


def gain(table: Table) -> Tensor:
    """Of each token, `[N]`."""
    return table["rule"] - table["proposal"]


def at_threshold(signal: Signal, table: Table, tau: float) -> dict[str, Any]:
    """Share of open tokens, likelihood and kept gain: means with 95 % intervals over prompts."""
    opens = signal.opens(table, tau).double()
    log_likelihood = torch.where(opens > 0, table["rule"], table["proposal"])
    every = torch.ones_like(opens)
    return {
        "tau": tau,
        "share": mean(table, opens, every),
        "nll": mean(table, -log_likelihood, every),
        "kept": mean(table, gain(table) * opens, gain(table)),
    }


def curve(signal: Signal, dev: Table, test: Table) -> list[dict[str, Any]]:
    """At each of `SHARES` on `dev`, what comes of that threshold on `test`."""
    return [{"goal": share, **at_threshold(signal, test, signal.threshold(dev, share))} for share in SHARES]


def half(signal: Signal, dev: Table, test: Table) -> dict[str, Any]:
    """What is kept at half the calls, and what `ENOUGH` takes.

    Returns:
        `half`: at the threshold that opens for half of `test` itself, which takes no answer to know; `enough`: at the
        smallest share that keeps `ENOUGH` on `dev`.
    """
    goal = signal.share_for(dev, ENOUGH)
    return {
        "half": at_threshold(signal, test, signal.threshold(test, 0.5)),
        "enough": {"goal": goal, **at_threshold(signal, test, signal.threshold(dev, goal))},
    }


def oracles(test: Table) -> dict[str, Any]:
    """The oracle and the null oracle: nats a token below the rule's NLL, at shares of calls and at the best share.

    The null oracle calls the rule at that share of tokens, and the rule with the other aligner at the rest.
    """
    other, rule = test["other"], test["rule"]
    found: dict[str, Any] = {}
    for name, alternative in ((ORACLE, test["proposal"]), ("null oracle", other)):
        worth = rule - alternative
        below = {}
        for share in SHARES:
            opens = worth >= worth.quantile(1 - share)
            below[str(share)] = mean(test, torch.where(opens, 0.0, -worth), torch.ones_like(worth))
        best = mean(test, (-worth).clamp(min=0), torch.ones_like(worth))
        found[name] = {"below": below, "best": best, "best_share": (worth > 0).double().mean().item()}
    return found


def places(table: Table) -> dict[str, Any]:
    """By place in the answer: the share of tokens, and of the gain."""
    position = table["position"]
    ends = torch.cat([position[1:] == 0, torch.ones(1, dtype=torch.bool)])
    chosen = {name: (position >= low) & (position < high) for name, (low, high) in PLACES.items()} | {"end of sequence": ends}
    return {
        name: {
            "share": which.double().mean().item(),
            "of_gain": mean(table, gain(table) * which, gain(table)),
            "gain": gain(table)[which].mean().item() if which.any() else None,
        }
        for name, which in chosen.items()
    }


def mean(table: Table, values: Tensor, sizes: Tensor) -> dict[str, Any]:
    """Σ values / Σ sizes over tokens `[N]`, with an interval over prompts."""
    prompts = table["prompt"].long()
    count = int(prompts.max()) + 1
    totals, whole = (values.new_zeros(count).index_add(0, prompts, part) for part in (values, sizes))
    return {"mean": (totals.sum() / whole.sum()).item(), "interval": list(ratio_interval(totals, whole))}
