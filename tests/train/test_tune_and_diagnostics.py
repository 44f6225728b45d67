"""The tuned weight is the minimiser; the diagnostics are what their names say, worked out by hand."""

import math

import pytest
import torch

from trimtab.core.logprobs import kl_divergence
from trimtab.core.objectives import likelihood
from trimtab.core.rules import Geometric, KLGate, Mixture, Product
from trimtab.models.table import TableLM
from trimtab.train.diagnostics import measure, summarise
from trimtab.train.tune import CHEAPEST, RANGES, Look, Stay, tune_weight


def looks_of(rule, logp, logq, tokens):
    """From a weight to the losses and to KL(aligned‖p̃); each token counts once."""

    def at(weight):
        return likelihood(rule, logp, logq, weight, tokens), kl_divergence(
            rule.target(logp, [logq], torch.tensor([weight])), logp
        )

    return Look(at, torch.ones(len(tokens)))


def rows(seed, count=40, v=6):
    return TableLM.random(v, seed=seed, scale=1.5).table[:v].repeat(count // v + 1, 1)[:count]


@pytest.mark.parametrize("rule", [Product(), Geometric()])
def test_the_weight_is_the_minimiser_of_the_likelihood(rule):
    """Brute force: −mean log(p̃^a q^w / Σ p̃^a q^w)(y) on a fine grid, with a = 1 (product) or 1−w (geometric)."""
    logp, logq = rows(1), rows(2)
    tokens = (0.4 * logp + 0.6 * logq).argmax(-1)
    tokens[::3] = logp.argmax(-1)[::3]
    low, high = RANGES[rule.name]

    def loss(weight):
        logw = (1 if isinstance(rule, Product) else 1 - weight) * logp + weight * logq
        return float((logw.logsumexp(-1) - logw[torch.arange(len(tokens)), tokens]).mean())

    best = min((low + (high - low) * i / 400 for i in range(401)), key=loss)
    halves = [(logp[:25], logq[:25], tokens[:25]), (logp[25:], logq[25:], tokens[25:])]
    weight, tried, kl, bound = tune_weight(rule, lambda: [looks_of(rule, *half) for half in halves])
    assert abs(weight - best) <= (high - low) / 32
    assert weight == min(tried, key=lambda pair: pair[1])[0]
    for w, value in tried:
        assert value == pytest.approx(loss(w))
    assert not bound
    assert kl == pytest.approx(divergence(rule, logp, logq, weight))


def some_tokens(logp, logq):
    tokens = (0.4 * logp + 0.6 * logq).argmax(-1)
    tokens[::3] = logp.argmax(-1)[::3]
    tokens[1::7] = 4
    return tokens


def test_the_share_of_a_mixture_is_the_minimiser_whatever_is_tried():
    """Not of a grid: the slope of mean log((1−w)·p̃ + w·q)(y) is 0 there, and it is the same from halves of the data."""
    logp, logq = rows(1), rows(2)
    tokens = some_tokens(logp, logq)
    halves = [(logp[:25], logq[:25], tokens[:25]), (logp[25:], logq[25:], tokens[25:])]
    weight, tried, kl, bound = tune_weight(Mixture(), lambda: [looks_of(Mixture(), *half) for half in halves])
    at = torch.arange(len(tokens))
    p, q = logp[at, tokens].exp(), logq[at, tokens].exp()
    assert 0.05 < weight < 0.95
    assert ((q - p) / ((1 - weight) * p + weight * q)).mean().item() == pytest.approx(0, abs=1e-6)
    assert [w for w, _ in tried] == [0, weight, 1]
    for w, value in tried:
        assert value == pytest.approx(-((1 - w) * p + w * q).log().mean().item())
    assert not bound
    assert kl == pytest.approx(divergence(Mixture(), logp, logq, weight))


def test_a_mixture_that_the_aligner_does_not_help_has_no_share_of_it():
    logp, logq = rows(1), rows(2)
    best = tune_weight(Mixture(), lambda: [looks_of(Mixture(), logp, logq, logp.argmax(-1))])
    assert (best.weight, best.kl) == (0, 0)
    ratios = (logq - logp).gather(-1, logp.argmax(-1, keepdim=True)).exp()
    assert ratios.mean() < 1


def divergence(rule, logp, logq, weight):
    """Mean KL(aligned‖p̃), written out."""
    if isinstance(rule, Mixture):
        aligned = (1 - weight) * logp.exp() + weight * logq.exp()
        return float((aligned * (aligned.log() - logp)).sum(-1).mean())
    aligned = ((1 if isinstance(rule, Product) else 1 - weight) * logp + weight * logq).softmax(-1)
    return float((aligned * (aligned.log() - logp)).sum(-1).mean())


@pytest.mark.parametrize("rule", [Product(), Geometric(), Mixture()])
@pytest.mark.parametrize("budget", [1e-4, 0.02, 0.1])
def test_a_budget_takes_the_largest_weight_within_it(rule, budget):
    """By brute force on a fine grid: no weight within the budget is larger by more than a 1/256 of the range."""
    logp, logq = rows(1), rows(2)
    tokens = logq.argmax(-1)  # the more of the aligner, the better
    low, high = RANGES[rule.name]
    weight, tried, kl, bound = tune_weight(rule, lambda: [looks_of(rule, logp, logq, tokens)], max_kl=budget)
    largest = max(w for i in range(2001) if divergence(rule, logp, logq, w := low + (high - low) * i / 2000) <= budget)
    assert bound
    assert 0 <= largest - weight <= (high - low) / 256
    assert kl == pytest.approx(divergence(rule, logp, logq, weight), abs=1e-7)
    assert kl <= budget
    assert weight in dict(tried)


def test_a_head_is_decoded_at_weight_one_unless_another_is_clearly_better():
    """At 1 the proposal's own upper layers need not be run. By hand: p̃ gives the wanted token 1/2, q some other chance."""
    logp = torch.tensor([[0.5, 0.5]] * 20, dtype=torch.float64).log()
    for right, best, weight in ((14, 0.85, 1.0), (11, 0.2, 0.2)):  # q is a little, or far, too sure
        logq = torch.tensor([[0.73, 0.27]] * 20, dtype=torch.float64).log()
        tokens = torch.tensor([0] * right + [1] * (20 - right))
        look = looks_of(Geometric(), logp, logq, tokens)
        plain = tune_weight(Geometric(), lambda: [look])  # noqa: B023
        assert plain.weight == pytest.approx(best, abs=1 / 32)
        assert tune_weight(Geometric(), lambda: [look], stay=CHEAPEST).weight == pytest.approx(weight, abs=1 / 32)  # noqa: B023


def test_likelihood_is_no_reason_to_leave_the_weight_that_learnt_preferences():
    """It is a weight that no grid has; beyond the budget, the nearest one within it is the best."""
    logp, logq = rows(1), rows(2)
    tokens = torch.tensor([1, 3] * 20)  # neither model's own
    look = looks_of(Geometric(), logp, logq, tokens)
    plain = tune_weight(Geometric(), lambda: [look])
    free = tune_weight(Geometric(), lambda: [look], stay=Stay(0.77, math.inf))
    assert free.weight == 0.77
    assert dict(free.tried)[0.77] > dict(plain.tried)[plain.weight] + 0.01
    assert [weight for weight, _ in free.tried] == [0, 0.77]
    budget = (plain.kl + free.kl) / 2
    bound = tune_weight(Geometric(), lambda: [look], max_kl=budget, stay=Stay(0.77, math.inf))
    assert bound.bound
    assert plain.weight < bound.weight < 0.77
    assert 0.95 * budget < bound.kl <= budget


def test_a_budget_keeps_a_head_from_weight_one():
    logp, logq = rows(1), rows(2)
    look = looks_of(Geometric(), logp, logq, logq.argmax(-1))
    free, bound = (tune_weight(Geometric(), lambda: [look], max_kl=most, stay=CHEAPEST) for most in (10.0, 0.1))
    assert free.weight == 1
    assert 0 < bound.weight < 1
    assert bound.kl <= 0.1


def test_a_budget_that_does_not_bind_changes_nothing():
    logp, logq = rows(1), rows(2)
    tokens = (0.4 * logp + 0.6 * logq).argmax(-1)
    look = looks_of(Product(), logp, logq, tokens)
    free = tune_weight(Product(), lambda: [look])
    assert tune_weight(Product(), lambda: [look], max_kl=free.kl) == free


def test_diagnostics_of_two_rows_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), λ = 1: Z = 5/16, aligned = (.4, .4, .2); then q uniform, aligned = p."""
    logp = torch.tensor([[0.5, 0.25, 0.25]] * 2, dtype=torch.float64).log()
    logq = torch.tensor([[0.25, 0.5, 0.25], [1 / 3] * 3], dtype=torch.float64).log()
    tokens = torch.tensor([1, 0])
    halves = [measure(Product(), logp[i : i + 1], logq[i : i + 1], 1.0, tokens[i : i + 1], 0.6) for i in range(2)]
    got = summarise(halves)
    z = math.log(5 / 16) + math.log(3)
    assert got.nll_proposal == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert got.nll_aligner == pytest.approx((math.log(2) + math.log(3)) / 2)
    assert got.nll_aligned == pytest.approx((-math.log(0.4) + math.log(2)) / 2)
    assert got.log_z_mean == pytest.approx(z / 2)
    assert got.log_z_std == pytest.approx(abs(z) / 2)
    moved = 0.4 * math.log(0.4 / 0.5) + 0.4 * math.log(0.4 / 0.25) + 0.2 * math.log(0.2 / 0.25)
    assert got.kl_aligned_proposal == pytest.approx(moved / 2)
    apart = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    uniform = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    assert got.kl_proposal_aligner == pytest.approx((apart + uniform) / 2)
    assert got.in_nucleus == 1.0  # .5 < .6, so both of the tied tokens behind it are in as well


def test_what_needs_the_log_of_every_token_is_taken_from_evenly_spread_rows():
    """p̃ has all of its tail, .5, on one of two tokens: Z is Σ p̃ q; KL(p̃‖q) and the nucleus are those of (1/2, 1/4, 1/4)."""
    even = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    drawn = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    logq = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    got = summarise([measure(Product(), drawn, logq, 1.0, torch.tensor([0]), 0.6, even)])
    assert got.log_z_mean == pytest.approx(math.log(0.125 + 0.25) + math.log(3))
    assert got.nll_aligned == pytest.approx(-math.log(1 / 3))
    assert got.kl_aligned_proposal == pytest.approx(math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3)
    assert got.kl_proposal_aligner == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert got.in_nucleus == 1.0


def test_a_shut_gate_does_not_move_the_proposal():
    logp, logq = rows(1), rows(2)
    got = summarise([measure(KLGate(tau=0.0), logp, logq, 1.0, logp.argmax(-1), 0.9)])
    assert got.kl_aligned_proposal == 0.0
    assert got.nll_aligned == got.nll_proposal
