"""The law of what `AlignedModel` generates, against enumeration from the definitions (`law_of`), on tables and models."""

import pytest

from law_of import EOS, expected_law
from statistics_of import fits
from tiny import tiny_model
from trimtab import AlignedModel, SamplingParams
from trimtab.models.table import TableLM

V = 5
SAMPLES = 6000


def sampled(model: AlignedModel, prompt: list[int], count: int = SAMPLES, **settings) -> list[tuple[int, ...]]:
    return [tuple(c.tokens) for c in model.generate([prompt], SamplingParams(n=count, seed=7, **settings))]


def tables(aligners: int):
    return [TableLM.random(V, order=2, seed=seed, zeros=0.15 if seed == 0 else 0.0) for seed in range(aligners + 1)]


POWERS = ["product", "geometric", "nucleus", "kl_gate(tau=0.3)", "nudge(tau=0.45)"]
"""Rules that take any weight."""
RULES = [*POWERS, "mixture", "gate(rule=mixture, by=kl, tau=0.4, invert=True)"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [[1.0], [0.4, 0.3], [0.0, 1.0]], ids=["one", "two", "all"])
def test_tables_follow_the_rule(rule, weights):
    proposal, *aligners = tables(len(weights))
    model = AlignedModel(proposal, aligners, eos_token_ids=[EOS], rule=rule, weight=weights, max_num_seqs=500)
    law = expected_law(proposal, aligners, rule, weights, [3], 3)
    assert fits(sampled(model, [3], max_tokens=3), law) > 1e-3


@pytest.mark.parametrize("rule", POWERS)
@pytest.mark.parametrize("weights", [[-0.8], [0.7, -1.2]], ids=["anti-expert", "proxy"])
def test_anti_experts_with_zeros_follow_the_rule(rule, weights):
    """What an anti-expert cannot say is drawn as the definition says, scored so, and drawn alike at any draft length."""
    proposal, *aligners = [TableLM.random(V, order=2, seed=seed, zeros=0.3) for seed in (10, 11, 12)[: 1 + len(weights)]]
    settings = {"eos_token_ids": [EOS], "rule": rule, "weight": weights, "max_num_seqs": 500}
    model = AlignedModel(proposal, aligners, **settings)
    law = expected_law(proposal, aligners, rule, weights, [3], 3)
    drawn = sampled(model, [3], max_tokens=3)
    assert fits(drawn, law) > 1e-3
    for completion, score in zip(law, model.score([[3]] * len(law), [list(c) for c in law]), strict=True):
        assert sum(score.aligned) == pytest.approx(law[completion], abs=1e-9)
    for length in (0, 1, 3):
        again = AlignedModel(proposal, aligners, num_speculative_tokens=length, **settings)
        assert sampled(again, [3], 1000, max_tokens=3) == drawn[:1000]


def test_the_warps_shape_the_inputs_and_the_temperature_the_result():
    proposal, aligner = tables(1)
    model = AlignedModel(
        proposal,
        [aligner],
        eos_token_ids=[EOS],
        proposal_temperature=0.7,
        proposal_top_p=0.8,
        aligner_temperature=1.5,
        max_num_seqs=500,
    )
    law = expected_law(proposal, [aligner], "product", [1.0], [1], 2, warps=(0.7, 0.8, 1.5), temperature=1.3)
    assert fits(sampled(model, [1], max_tokens=2, temperature=1.3), law) > 1e-3
    wrong = expected_law(proposal, [aligner], "product", [1.0], [1], 2, temperature=1.3)
    assert fits(sampled(model, [1], max_tokens=2, temperature=1.3), wrong) < 1e-6, "the test cannot tell laws apart"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("rule", ["product", "nucleus"])
def test_transformers_pairs_follow_the_rule(kind, rule):
    loaded = [tiny_model(kind, V, seed=0, spread=0.3), tiny_model("llama", V, seed=1, spread=0.3)]
    model = AlignedModel.from_pretrained(loaded[0], loaded[1], rule=rule, proposal_top_p=0.9, max_num_seqs=500)
    law = expected_law(model.proposal, model.aligners, rule, [1.0], [2, 3], 3, warps=(1.0, 0.9, 1.0))
    assert fits(sampled(model, [2, 3], max_tokens=3), law) > 1e-3


def test_a_mixed_batch_follows_each_requests_own_rule():
    proposal, *aligners = tables(2)
    model = AlignedModel(proposal, aligners, eos_token_ids=[EOS], max_num_seqs=700)
    requests = [("product", [1.0, 0.5]), ("geometric", [0.2, 0.3]), ("nucleus", [1.0, 0.0]), ("kl_gate(tau=0.5)", [0.5, 0.5])]
    requests += [
        ("mixture", [0.5, 0.2]),
        ("gate(rule=mixture, by=entropy, tau=1.2)", [0.3, 0.7]),
        ("nudge(tau=0.5)", [1.0, 0.0]),
    ]
    params = [SamplingParams(max_tokens=2, n=3000, seed=i, rule=rule, weight=w) for i, (rule, w) in enumerate(requests)]
    out = model.generate([[1 + i % 4] for i in range(len(requests))], params)
    for i, (rule, weights) in enumerate(requests):
        law = expected_law(proposal, aligners, rule, weights, [1 + i % 4], 2)
        assert fits([tuple(c.tokens) for c in out[3000 * i : 3000 * (i + 1)]], law) > 1e-3


def test_candidates_are_sampled_in_the_batch_with_their_own_law():
    """One candidate is the proposal; many are the product."""
    proposal, aligner = tables(1)
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], max_num_seqs=600)
    settings = {"max_tokens": 2, "n": 1500}
    params = [SamplingParams(seed=1, rule=rule, **settings) for rule in ("candidates(n=1)", "candidates(n=150)", "geometric")]
    out = model.generate([[2], [2], [2]], params)
    only = expected_law(proposal, [aligner], "geometric", [0.0], [2], 2)
    product = expected_law(proposal, [aligner], "product", [1.0], [2], 2)
    assert fits([tuple(c.tokens) for c in out[:1500]], only) > 1e-3
    assert fits([tuple(c.tokens) for c in out[1500:3000]], product) > 1e-3
    assert fits([tuple(c.tokens) for c in out[:1500]], product) < 1e-6


def test_the_bare_proposal_is_the_proposal():
    proposal = tables(0)[0]
    model = AlignedModel(proposal, eos_token_ids=[EOS], max_num_seqs=500)
    assert fits(sampled(model, [1], max_tokens=3), proposal.enumerate([1], 3, [EOS])) > 1e-3
