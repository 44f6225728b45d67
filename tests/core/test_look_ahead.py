"""Which aligner reaches the sequence-level law token by token: the one that looks ahead. By a backward recursion on tables."""

import functools
import math

import pytest
import torch

from trimtab.core.rules import Geometric, Product, Rule
from trimtab.models.table import TableLM, enumerate_sequences

V, EOS, LIMIT, PROMPT = 4, 0, 4, (1,)
PROPOSAL, ALIGNER = TableLM.random(V, order=2, seed=0), TableLM.random(V, order=2, seed=1)


def weights_of(rule: Rule, strength: float, prefix: tuple[int, ...]) -> torch.Tensor:
    """log w(v) of each token behind a prefix, before the row is normalised."""
    logp, logq = PROPOSAL.row(prefix), ALIGNER.row(prefix)
    return (1 - strength) * logp + strength * logq if isinstance(rule, Geometric) else logp + strength * logq


def sequence_law(rule: Rule, strength: float) -> dict[tuple[int, ...], float]:
    """Π w_t(y_t) / Z for every text."""
    found = enumerate_sequences(lambda prefix: weights_of(rule, strength, tuple(prefix)), PROMPT, LIMIT, [EOS])
    log_z = torch.tensor(list(found.values()), dtype=torch.float64).logsumexp(0).item()
    return {text: math.exp(logw - log_z) for text, logw in found.items()}


def token_law(rule: Rule, strength: float, aligner: object) -> dict[tuple[int, ...], float]:
    """Of what is decoded token by token with an aligner's rows."""

    def row(prefix: list[int]) -> torch.Tensor:
        return rule(PROPOSAL.row(prefix), [aligner(tuple(prefix))], [strength])

    return {text: math.exp(logp) for text, logp in enumerate_sequences(row, PROMPT, LIMIT, [EOS]).items()}


def distance(one: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    return sum(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in one.keys() | other.keys()) / 2


@pytest.mark.parametrize(("rule", "strength"), [(Product(), 1.0), (Product(), 0.5), (Product(), 2.0), (Geometric(), 0.4)])
def test_the_token_level_law_of_the_aligner_that_looks_ahead_is_the_sequence_level_law(rule, strength):
    @functools.cache
    def log_f(prefix: tuple[int, ...]) -> float:
        """Log of the weight of all that may follow a prefix: one text, the empty one, behind its end."""
        if prefix[-1] == EOS or len(prefix) == len(PROMPT) + LIMIT:
            return 0.0
        ahead = torch.tensor([log_f((*prefix, v)) for v in range(V)], dtype=torch.float64)
        return float((weights_of(rule, strength, prefix) + ahead).logsumexp(0))

    def looking(prefix: tuple[int, ...]) -> torch.Tensor:
        ahead = torch.tensor([log_f((*prefix, v)) for v in range(V)], dtype=torch.float64)
        return (ALIGNER.row(prefix) + ahead / strength).log_softmax(-1)

    wanted = sequence_law(rule, strength)
    assert sum(wanted.values()) == pytest.approx(1)
    assert distance(token_law(rule, strength, looking), wanted) < 1e-12
    assert distance(token_law(rule, strength, ALIGNER.row), wanted) > 0.02
