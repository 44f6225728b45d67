"""What a gate's text is like, how many aligner calls it takes, and what a token of it costs."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from chats import Record
from rivals import wanted

from trimtab.core.rules import Gate, Rule
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.evaluate.intervals import mean_interval, ratio_interval
from trimtab.judges.references import ReferenceMetric

__all__ = ["METRICS", "compare", "measure_cost", "text_of"]

METRICS = ("rougeL", "chrf")
COST_PROMPTS, COST_TOKENS, COST_TURNS = 4, 24, 3


def text_of(model: AlignedModel, rule: Rule | None, records: Sequence[Record], max_tokens: int) -> dict[str, Any]:
    """Greedy answers to each prompt under a rule (None: the bare proposal), judged against the wanted ones.

    Returns:
        A value for each prompt: `answers`, `tokens`, `calls` of the aligner, `rougeL`, `chrf`, and whether it `ended`.
    """
    weight = model.shaping(model.defaults).weights
    asked = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, rule=rule, weight=weight)
    if rule is None:
        asked, model = replace(asked, weight=None), model.with_aligners(())
    said = model.generate([record["prompt"] for record in records], asked)
    found: dict[str, Any] = {
        "answers": [one.text for one in said],
        "tokens": [len(one.tokens) for one in said],
        "calls": [0 if rule is None else len(one.tokens) - (one.fallbacks or 0) for one in said],
        "ended": [one.finish_reason == "stop" for one in said],
    }
    references = [[wanted(record)[0]["content"]] for record in records]
    for metric in (ReferenceMetric("rougeL", tokenizer="unicode"), ReferenceMetric("chrf")):
        found[metric.name] = metric.score(found["answers"], references)
    return found


def compare(found: dict[str, Any], rule: dict[str, Any]) -> dict[str, Any]:
    """The figures of a gate's texts, and how they differ from the rule's, paired by prompt; 95 % intervals over prompts."""
    tokens, calls = (torch.tensor(found[name], dtype=torch.float64) for name in ("tokens", "calls"))
    figures: dict[str, Any] = {
        "share": {"mean": (calls.sum() / tokens.sum()).item(), "interval": list(ratio_interval(calls, tokens))},
        "calls": _mean(found["calls"]),
        "tokens": _mean(found["tokens"]),
        "ended": sum(found["ended"]) / len(found["ended"]),
    }
    for name in METRICS:
        figures[name] = _mean(found[name])
        figures[f"{name}_minus_rule"] = _mean([a - b for a, b in zip(found[name], rule[name], strict=True)])
    return figures


def _mean(values: Sequence[float]) -> dict[str, Any]:
    table = torch.tensor(values, dtype=torch.float64)
    return {"mean": table.mean().item(), "interval": list(mean_interval(table))}


def measure_cost(model: AlignedModel, records: Sequence[Record]) -> dict[str, Any]:
    """Milliseconds a token of the bare proposal, the rule, and a gate that is always open; one prompt at a time, in turns.

    Every answer has as many tokens, for the end of sequence is forbidden, and is made token by token; what prompts begin with
    alike is read once. The gate asks both models in full, whatever it decides: `gate − proposal` is what an aligner call costs
    beside the proposal's pass. An engine that asks the aligner at a share s of the tokens saves no more than the other calls:
    `floor[s] = proposal + s (gate − proposal)`.
    """
    shaping = model.shaping(model.defaults)
    bare = model.with_aligners(()).with_draft_length(0)
    model = model.with_draft_length(0)
    base = SamplingParams(
        max_tokens=COST_TOKENS, temperature=0.0, seed=0, logit_bias=dict.fromkeys(model.eos_token_ids, -100.0)
    )
    always = Gate(shaping.rule, by="entropy", tau=0.0)
    contestants = {
        "proposal": (bare, base),
        "rule": (model, base),
        "gate": (model, replace(base, rule=always, weight=shaping.weights)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(COST_TURNS + 1):
        spent = dict.fromkeys(contestants, 0.0)
        tokens = dict.fromkeys(contestants, 0)
        for record in records[:COST_PROMPTS]:
            for name, (who, asked) in contestants.items():
                started = time.perf_counter()
                tokens[name] += len(who.generate([record["prompt"]], asked)[0].tokens)
                spent[name] += time.perf_counter() - started
        if turn:  # the first warms up
            for name in contestants:
                seconds[name].append(spent[name] / tokens[name])
    cost = {name: 1000 * sorted(times)[len(times) // 2] for name, times in seconds.items()}
    call = cost["gate"] - cost["proposal"]
    return cost | {"floor": {str(share): cost["proposal"] + share * call for share in (0.25, 0.5, 0.75)}}
