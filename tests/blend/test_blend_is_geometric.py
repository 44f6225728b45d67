"""On aligners that are linear in their parameters, blending is `geometric` with A0 in the proposal's place.

If log q_θ(v|s) = θ·φ(s, v) − log Z_θ(s), then θ = (1 − Σλ)·θ_0 + Σ λ_d·θ_d gives, but for normalising,
log q_θ = (1 − Σλ)·log q_0 + Σ λ_d·log q_d: the rows of `geometric` with q_0 for the proposal and λ for the weights.
Tables of logits are such models, and so is any read-out of fixed features. Models of layers are not: there the two differ.
"""

import pytest
import torch

from law_of import expected_law
from trimtab.blend.arithmetic import factors, weighted_sum
from trimtab.core.noise import uniforms
from trimtab.core.rules import parse_rule
from trimtab.models.table import TableLM

V, EOS = 5, 0
WEIGHTS = [[0.7], [0.7, -0.3], [0.4, 0.3, 0.3], [1.5, -1.0, 0.25]]


def arithmetic(parameters: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return weighted_sum([lambda one=one: one for one in parameters], factors(weights))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_on_tables_by_enumeration(weights):
    """The law of whole texts, under the definition of the rule in plain Python."""
    base, *moved = [TableLM.random(V, order=2, seed=seed) for seed in range(len(weights) + 1)]
    blend = TableLM(arithmetic([one.table for one in (base, *moved)], weights))
    law, expected = blend.enumerate([3], 3, [EOS]), expected_law(base, moved, "geometric", weights, [3], 3)
    assert law.keys() == expected.keys()
    assert max(abs(law[text] - expected[text]) for text in law) < 1e-12
    assert max(abs(law[text] - base.enumerate([3], 3, [EOS])[text]) for text in law) > 0.01, "the blend must matter"


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_on_read_outs_of_fixed_features(weights):
    """logits = W·φ(prefix), for any features of the prefix."""
    features = uniforms([9], [0], [0], 20, 6)[0] * 2 - 1
    base, *moved = [uniforms([seed], [0], [0], V, 6)[0] * 4 - 2 for seed in range(len(weights) + 1)]
    rows = [torch.log_softmax(features @ read_out.T, -1)[None] for read_out in (base, *moved)]
    blend = torch.log_softmax(features @ arithmetic([base, *moved], weights).T, -1)[None]
    torch.testing.assert_close(blend, parse_rule("geometric")(rows[0], rows[1:], weights), atol=1e-12, rtol=0)


def test_on_models_of_layers_it_is_not():
    """Two layers, and the same arithmetic: so the proof is about linear models, and not about the test."""
    first, second = ([uniforms([seed], [i], [0], V, 6)[0] * 4 - 2 for i in (0, 1)] for seed in (1, 2))
    features = uniforms([9], [0], [0], 20, 6)[0] * 2 - 1

    def rows(lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax((features @ lower.T).tanh() @ upper[:, :V].T, -1)[None]

    blend = rows(*(arithmetic([a, b], [0.5]) for a, b in zip(first, second, strict=True)))
    mixed = parse_rule("geometric")(rows(*first), [rows(*second)], [0.5])
    assert (blend - mixed).abs().max() > 0.05
