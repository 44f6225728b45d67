"""The best shares of a mixture: brute force, the conditions of Karush, Kuhn and Tucker, and the law that data come from."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from trimtab.core.logprobs import gather, log_normalize
from trimtab.core.objectives import likelihood
from trimtab.core.rules import Mixture
from trimtab.core.shares import GAP, best_shares
from trimtab.models.table import TableLM


def tables(aligners: int, count: int = 400, v: int = 7, seed: int = 0):
    """Log-probabilities of tokens, for proposal and aligners; the tokens are drawn from one more table."""
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(0, v, (count,), generator=generator)
    *models, truth = [TableLM.random(v, order=1, seed=seed + i, scale=1.2).table[:v][contexts] for i in range(aligners + 2)]
    mixed = (truth.exp() + sum(model.exp() for model in models)) / (len(models) + 1)
    tokens = torch.multinomial(mixed, 1, generator=generator).squeeze(-1)
    return models, tokens, [gather(model, tokens) for model in models]


def loss_of(weights, said) -> float:
    """−mean log Σ s_k a_k, in plain Python."""
    shares = [1 - math.fsum(weights), *weights]
    rows = zip(*(one.tolist() for one in said), strict=True)
    each = [-math.log(math.fsum(s * math.exp(a) for s, a in zip(shares, row, strict=True))) for row in rows]
    return math.fsum(each) / len(each)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("aligners", [1, 2])
def test_it_is_what_brute_force_finds(aligners, seed):
    models, tokens, said = tables(aligners, 60, seed=10 * seed)
    found = best_shares(said[0], said[1:])
    steps = 200 if aligners == 1 else 40
    grid = [w for w in itertools.product([i / steps for i in range(steps + 1)], repeat=aligners) if sum(w) <= 1]
    losses = {w: loss_of(w, said) for w in grid}
    best = min(losses, key=losses.__getitem__)
    assert found.loss <= losses[best] + 1e-9
    assert max(abs(a - b) for a, b in zip(found.aligners, best, strict=True)) <= 1.5 / steps
    assert found.loss == pytest.approx(loss_of(found.aligners, said))
    rows = [Mixture()(models[0], models[1:], list(found.aligners))]
    assert found.loss == pytest.approx(-gather(rows[0], tokens).mean().item())


@pytest.mark.parametrize(("aligners", "seed"), [(1, 0), (2, 1), (3, 2), (5, 3), (8, 4)])
def test_the_conditions_of_an_optimum_hold(aligners, seed):
    """With multiplier 1: g_k = 1 where a component has a share, and at most 1 where it has none. The gap says by how much."""
    _, _, said = tables(aligners, seed=seed)
    found = best_shares(said[0], said[1:])
    shares = torch.tensor([1 - math.fsum(found.aligners), *found.aligners], dtype=torch.float64)
    likely = torch.stack(said, -1).exp()
    slopes = (likely / (likely @ shares).unsqueeze(-1)).mean(0)
    assert found.gap <= 1e-12 < GAP, "as near as rounding lets it"
    assert slopes.max().item() <= 1 + 2 * GAP
    assert_close(slopes[shares > 0], torch.ones_like(slopes[shares > 0]), atol=1e-8, rtol=0)
    assert bool((shares >= 0).all())


def test_a_useless_aligner_has_a_share_of_exactly_nothing():
    """Its mean ratio is below 1, so that nothing is gained by any share of it: at the proposal, the slope is that minus 1."""
    _, _, said = tables(2)
    useless = said[0] - 0.5
    assert (useless - said[0]).exp().mean() < 1
    found = best_shares(said[0], [said[1], useless])
    assert found.aligners[1] == 0
    assert found.aligners[0] == pytest.approx(best_shares(said[0], [said[1]]).aligners[0], abs=1e-6)
    assert best_shares(said[0], [useless]).aligners == (0.0,)
    assert best_shares(useless, [said[0]]).aligners == (1.0,)


@pytest.mark.parametrize("seed", range(6))
def test_a_share_helps_exactly_if_the_mean_ratio_is_above_one(seed):
    models, tokens, said = tables(1, 30, seed=100 + seed)
    ratio = (said[1] - said[0]).exp().mean().item()
    found = best_shares(said[0], said[1:])
    assert (found.aligners[0] > 0) == (ratio > 1)
    small = 1e-6
    gain = -likelihood(Mixture(), models[0], models[1], small, tokens).mean() - said[0].mean()
    assert gain.item() / small == pytest.approx(ratio - 1, abs=1e-4)


def test_data_of_a_mixture_give_its_shares_back():
    """Exactly, for the population: every token, weighted by the law, is as many tokens as that."""
    v, shares = 9, [0.5, 0.2, 0.3]
    models = [log_normalize(torch.randn(v, generator=torch.Generator().manual_seed(i), dtype=torch.float64)) for i in range(3)]
    law = sum(s * model.exp() for s, model in zip(shares, models, strict=True))
    counts = (law * 2_000_000).round().long()
    tokens = torch.arange(v).repeat_interleave(counts)
    found = best_shares(models[0][tokens], [model[tokens] for model in models[1:]])
    assert_close(found.aligners, (0.2, 0.3), atol=1e-4, rtol=0)


def test_what_the_proposal_cannot_say_is_left_out_and_what_aligners_cannot_say_is_not():
    logp, logq = torch.tensor([-1.0, -2.0, -math.inf]), torch.tensor([-math.inf, -0.1, -0.5])
    found = best_shares(logp, [logq])
    assert found.tokens == 2
    p, q = math.exp(-2), math.exp(-0.1)  # ½ [log(1 − w) + log((1 − w)p + wq)] is highest where its slope is 0
    assert found.aligners[0] == pytest.approx((q - 2 * p) / (2 * (q - p)), abs=1e-6)
    assert best_shares(logp[2:], [logq[2:]]) == ((0.0,), 0.0, 0.0, 0)


def test_parts_of_the_tokens_add_up():
    """As the processes of a run have them: each sees its own, and the sums are of all."""
    _, _, said = tables(2)
    whole = best_shares(said[0], said[1:])
    for cut in (0, 150, 400):  # the other process's part is played by a second copy of the sums
        parts = [[one[:cut] for one in said], [one[cut:] for one in said]]
        found = together(parts)
        assert_close([*found[0].aligners, found[0].loss], [*whole.aligners, whole.loss], atol=1e-7, rtol=0)
        assert found[0] == found[1]


def together(parts):
    """Each part in a thread of its own; sums wait for one another."""
    import threading

    barrier, given, done = threading.Barrier(len(parts)), {}, {}

    def run(rank, said):
        def total(values):
            given[rank] = values
            barrier.wait(20)
            sums = sum(given[other] for other in sorted(given))
            barrier.wait(20)
            return sums

        done[rank] = best_shares(said[0], said[1:], total)

    threads = [threading.Thread(target=run, args=(rank, said)) for rank, said in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [done[rank] for rank in range(len(parts))]
