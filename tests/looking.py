"""Rules that look at the text before their row, and their laws by recursion over all texts, written from the definitions."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from law_of import EOS, expected_row, probabilities, tempered
from trimtab.core.rules import Rule, weighted_sum
from trimtab.models.table import enumerate_sequences


@dataclass(frozen=True)
class Handover(Rule):
    """q until the mean log p̃ of the answer's last two tokens is at least `tau`; from then on p̃. The switch is a state."""

    name: ClassVar[str] = "handover"
    marks: ClassVar[str | None] = "the proposal's own"
    window = 2
    reads_logp = True
    state_size = 1
    tau: float = -1.5

    def log_weights(self, logp, logqs, weights, *, context=None):
        return torch.where(context.state > 0, logp, weighted_sum(logqs, weights))

    def marked(self, logp, logqs, weights, *, context=None):
        return context.state[..., 0] > 0

    def advance(self, context, tokens, logp):
        both = torch.stack([context.logp[..., -1], logp], -1)
        return torch.maximum(context.state, (both.mean(-1) >= self.tau).double().unsqueeze(-1))


@dataclass(frozen=True)
class Tiring(Rule):
    """`product` whose weight fades by how often the answer has said `token`, and is doubled right after a 2, the prompt's, too.

    Log Z is one token's to tell: it weighs tokens.
    """

    name: ClassVar[str] = "tiring"
    window = 1
    state_size = 1
    weighs_tokens = True
    token: int = 1
    doubled: bool = True

    def log_weights(self, logp, logqs, weights, *, context=None):
        factor = 1 / (1 + context.state)
        if self.doubled:
            factor = factor * torch.where(context.tokens == 2, 2.0, 1.0)
        return logp + factor.to(logp.dtype) * weighted_sum(logqs, weights)

    def advance(self, context, tokens, logp):
        return context.state + (tokens == self.token).unsqueeze(-1)


@dataclass(frozen=True)
class Opening(Rule):
    """`product` at the answer's first `tokens` tokens and at even places of the text, p̃ elsewhere: it looks at positions."""

    name: ClassVar[str] = "opening"
    looks_back = True
    tokens: int = 2

    def log_weights(self, logp, logqs, weights, *, context=None):
        speaks = (context.position - context.prompt_length < self.tokens) | (context.position % 2 == 0)
        return torch.where(speaks.unsqueeze(-1), logp + weighted_sum(logqs, weights), logp)


LOOKING = (Handover, Tiring, Opening)


def looking_row(rule, proposal, aligners, weights, prompt, prefix, warps=(1.0, 1.0, 1.0)):
    """Probabilities after `prefix`, which begins with `prompt`, by the definition of a rule of this module."""
    temperature, top_p, aligner_temperature = warps

    def rows(text):
        q = [tempered(probabilities(model, text), aligner_temperature) for model in aligners]
        return tempered(probabilities(proposal, text), temperature, top_p), q

    p, q = rows(prefix)
    answer = list(prefix[len(prompt) :])
    if rule.name == "handover":
        logs = [math.log(rows(prefix[:i])[0][prefix[i]]) for i in range(len(prompt), len(prefix))]
        over = any((logs[i] + logs[i + 1]) / 2 >= rule.tau for i in range(len(logs) - 1))
        mixed = [math.prod(row[v] ** w for row, w in zip(q, weights, strict=True)) if p[v] else 0.0 for v in range(len(p))]
        return p if over else [value / math.fsum(mixed) for value in mixed]
    if rule.name == "tiring":
        factor = (2.0 if rule.doubled and prefix[-1] == 2 else 1.0) / (1 + answer.count(rule.token))
        return expected_row("product", p, q, [factor * weight for weight in weights])
    speaks = len(answer) < rule.tokens or len(prefix) % 2 == 0
    return expected_row("product", p, q, list(weights)) if speaks else p


def looking_law(rule, proposal, aligners, weights, prompt, length, warps=(1.0, 1.0, 1.0), temperature=1.0):
    """Every answer's log-probability."""

    def row(prefix):
        target = tempered(looking_row(rule, proposal, aligners, weights, prompt, prefix, warps), temperature)
        return torch.tensor(target, dtype=torch.float64).log()

    return enumerate_sequences(row, prompt, length, [EOS])
