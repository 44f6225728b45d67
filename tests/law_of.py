"""The law of aligned text by enumeration, written from the definitions.

Nothing in `expected_row` comes from `trimtab`: it is the specification of each rule in plain Python.
"""

import math

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


def expected_row(rule: str, p: list[float], qs: list[list[float]], weights: list[float]) -> list[float]:
    """The decoding rules of the specification, in plain Python on probabilities."""
    steered = [powers(row, w) for row, w in zip(qs, weights, strict=True)]
    q = [math.prod(row[token] for row in steered) for token in range(len(p))]
    if rule == "product":
        raw = [a * b for a, b in zip(p, q, strict=True)]
    elif rule == "geometric":
        raw = [a ** (1 - sum(weights)) * b if a else 0.0 for a, b in zip(p, q, strict=True)]
    else:
        raw = [b if a else 0.0 for a, b in zip(p, q, strict=True)]
    if rule.startswith("kl_gate"):
        unit = [b / math.fsum(q) for b in q]
        tau = float(rule.removeprefix("kl_gate(tau=").removesuffix(")"))
        if math.fsum(a * (math.log(a / b) if b else math.inf) for a, b in zip(p, unit, strict=True) if a) > tau:
            raw = p
    return [r / math.fsum(raw) for r in raw]


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
