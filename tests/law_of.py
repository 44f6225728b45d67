"""The law of aligned text by enumeration, written from the definitions.

Nothing in `expected_row` comes from `trimtab`: it is the specification of each rule in plain Python.
"""

import math
import re

import torch

from trimtab.models.table import enumerate_sequences

EOS = 0


def tempered(row: list[float], temperature: float, top_p: float = 1.0) -> list[float]:
    weights = [p ** (1 / temperature) for p in row]
    probs = [w / math.fsum(weights) for w in weights]
    if top_p < 1:
        probs = [p if math.fsum(q for q in probs if q > p) < top_p else 0.0 for p in probs]
    return [p / math.fsum(probs) for p in probs]


def powers(q: list[float], weight: float) -> list[float]:
    """Each q(v)^λ; an anti-expert takes what it cannot say for its least likely possible token."""
    least = min(p for p in q if p > 0)
    return [1.0 if weight == 0 else (max(p, least) if weight < 0 else p) ** weight for p in q]


GATE = re.compile(r"gate\(rule=(?P<rule>.+), by=(?P<by>\w+), tau=(?P<tau>[^,]+?)(?P<invert>, invert=True)?\)")
NAMED = {"kl_gate": "gate(rule=nucleus, by=kl, tau={})", "nudge": "gate(rule=nucleus, by=max_p, tau={})"}


def expected_row(rule: str, p: list[float], qs: list[list[float]], weights: list[float]) -> list[float]:
    """The decoding rules of the specification, in plain Python on probabilities. A gate says `rule`, `by` and `tau`."""
    for name, meaning in NAMED.items():
        if rule.startswith(name):
            rule = meaning.format(rule.removeprefix(f"{name}(tau=").removesuffix(")"))
    if gate := GATE.fullmatch(rule):
        is_open = opens(gate["by"], float(gate["tau"]), p, together(gate["rule"], qs, weights))
        return expected_row(gate["rule"], p, qs, weights) if is_open != bool(gate["invert"]) else p
    q = together(rule, qs, weights) if qs else [1.0] * len(p)
    if rule == "product":
        raw = [a * b for a, b in zip(p, q, strict=True)]
    elif rule == "geometric":
        raw = [a ** (1 - sum(weights)) * b if a else 0.0 for a, b in zip(p, q, strict=True)]
    elif rule == "mixture":
        raw = [(1 - sum(weights)) * a + b if a else 0.0 for a, b in zip(p, q, strict=True)]
    else:
        assert rule == "nucleus"
        raw = [b if a else 0.0 for a, b in zip(p, q, strict=True)]
    return [r / math.fsum(raw) for r in raw]


def together(rule: str, qs: list[list[float]], weights: list[float]) -> list[float]:
    """What the aligners say: their weighted product, or in a mixture their weighted sum; not normalised."""
    tokens = range(len(qs[0]))
    if rule == "mixture":
        return [math.fsum(w * row[token] for row, w in zip(qs, weights, strict=True)) for token in tokens]
    steered = [powers(row, w) for row, w in zip(qs, weights, strict=True)]
    return [math.prod(row[token] for row in steered) for token in tokens]


def opens(by: str, tau: float, p: list[float], q: list[float]) -> bool:
    """Whether a gate is open."""
    if by == "max_p":
        return max(p) < tau
    if by == "entropy":
        return -math.fsum(a * math.log(a) for a in p if a) >= tau
    unit = [b / math.fsum(q) for b in q]
    return math.fsum(a * (math.log(a / b) if b else math.inf) for a, b in zip(p, unit, strict=True) if a) <= tau


def probabilities(model, prefix) -> list[float]:
    state = model.new_state(1, len(prefix))
    return model.extend(state, torch.tensor([list(prefix)]), [len(prefix)])[0, -1].double().exp().tolist()


def expected_law(proposal, aligners, rule, weights, prompt, length, *, warps=(1.0, 1.0, 1.0), temperature=1.0):
    proposal_temperature, proposal_top_p, aligner_temperature = warps

    def row(prefix):
        p = tempered(probabilities(proposal, prefix), proposal_temperature, proposal_top_p)
        qs = [tempered(probabilities(q, prefix), aligner_temperature) for q in aligners]
        target = tempered(expected_row(rule, p, qs, weights), temperature)
        return torch.tensor(target, dtype=torch.float64).log()

    return enumerate_sequences(row, prompt, length, [EOS])


def possible(logits: torch.Tensor) -> torch.Tensor:
    """Logits as a softmax in float32 sees them: what stands far below the rest cannot be drawn."""
    return torch.where(logits < logits.amax(-1, keepdim=True) - 1e5, -math.inf, logits)
