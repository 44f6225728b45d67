"""A user's weights from pairs: the optimum by brute force, planted weights recovered, and how much a few pairs tell."""

import math
import time

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from trimtab.core.user_weights import fit_user_weights


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def preferred(features: Tensor, weights: Tensor, beta: float, seed: int) -> Tensor:
    """The pairs as a user of these weights orders them: by σ(β λ·f)."""
    chance = torch.sigmoid(beta * features @ weights)
    kept = torch.rand(len(features), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < chance
    return torch.where(kept.unsqueeze(-1), features, -features)


def posterior(features: Tensor, at: Tensor, prior: Tensor, beta: float, scale: float) -> Tensor:
    """J of many weights `[M, K]`, as it is written."""
    losses = torch.log1p(torch.exp(-beta * at @ features.T)).sum(-1)
    return losses + ((at - prior) ** 2).sum(-1) / (2 * scale**2)


@pytest.mark.parametrize(("beta", "scale", "seed"), [(0.1, 1.0, 0), (1.0, 0.5, 1), (0.3, 3.0, 2)])
def test_the_weights_are_the_best_of_a_grid(beta, scale, seed):
    prior = torch.tensor([0.5, -0.2], dtype=torch.float64)
    features = 5 * draw(9, 2, seed=seed)
    found = fit_user_weights(features, prior, beta=beta, scale=scale)
    line = torch.linspace(-0.05, 0.05, 201, dtype=torch.float64)
    grid = found.mean + torch.cartesian_prod(line, line)
    values = posterior(features, grid, prior, beta, scale)
    assert int(values.argmin()) == len(grid) // 2, "the middle"
    wide = torch.cartesian_prod(*[torch.linspace(-8, 8, 161, dtype=torch.float64)] * 2)
    assert float(posterior(features, wide, prior, beta, scale).min()) >= float(values.min())


def test_the_covariance_is_the_inverse_of_the_curvature():
    prior, features = torch.zeros(3, dtype=torch.float64), 4 * draw(7, 3, seed=1)
    found = fit_user_weights(features, prior, beta=0.3, scale=1.5)
    curvature = torch.autograd.functional.hessian(
        lambda at: posterior(features, at.unsqueeze(0), prior, 0.3, 1.5).sum(), found.mean
    )
    assert_close(found.covariance @ curvature, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close(found.deviation, found.covariance.diagonal().sqrt())


def test_without_pairs_nothing_moves():
    prior = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = fit_user_weights(torch.zeros(0, 2), prior, beta=0.1, scale=0.7)
    assert torch.equal(found.mean, prior)
    assert_close(found.deviation, torch.full((2,), 0.7, dtype=torch.float64))


def test_the_order_of_pairs_does_not_matter_and_one_that_says_nothing_moves_nothing():
    features, prior = 3 * draw(12, 4, seed=3), torch.zeros(4, dtype=torch.float64)
    found = fit_user_weights(features, prior, beta=0.2, scale=1.0)
    other = fit_user_weights(features.flip(0), prior, beta=0.2, scale=1.0)
    assert_close(found.mean, other.mean, atol=1e-12, rtol=0)
    more = fit_user_weights(torch.cat([features, torch.zeros(5, 4, dtype=torch.float64)]), prior, beta=0.2, scale=1.0)
    assert_close(found.mean, more.mean, atol=1e-12, rtol=0)


def test_planted_weights_are_in_their_intervals_as_often_as_said():
    """Of 300 users whose weights come from the prior."""
    prior, scale, beta, inside = torch.tensor([0.3, 0.0, -0.3], dtype=torch.float64), 0.8, 0.2, []
    for user in range(300):
        weights = prior + scale * draw(3, seed=user)
        features = preferred(6 * draw(40, 3, seed=1000 + user), weights, beta, 2000 + user)
        found = fit_user_weights(features, prior, beta=beta, scale=scale)
        inside.append((found.mean - weights).abs() <= 1.96 * found.deviation)
    share = torch.stack(inside).double().mean().item()
    assert share == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("aligners", [2, 8])
def test_a_few_pairs_tell_opposite_users_apart(aligners):
    """Half of them have the weights of the other half with the sign turned, so nothing can be said without pairs."""
    beta, right = 0.1, {count: [] for count in (0, 1, 3, 5, 10)}
    for user in range(400):
        weights = draw(aligners, seed=user // 2) * (-1) ** user
        features = preferred(10 * draw(10, aligners, seed=3000 + user), weights, beta, 4000 + user)
        others = 10 * draw(200, aligners, seed=5000 + user)
        others = torch.where((others @ weights > 0).unsqueeze(-1), others, -others)
        for count, some in right.items():
            found = fit_user_weights(features[:count], torch.zeros(aligners), beta=beta, scale=1.0).mean
            margins = others @ found
            some.append(float(((margins > 0).double() + (margins == 0).double() / 2).mean()))
    accuracy = {count: sum(some) / len(some) for count, some in right.items()}
    assert accuracy[0] == 0.5
    assert 0.5 < accuracy[1] < accuracy[3] < accuracy[5] < accuracy[10]
    assert accuracy[5] >= 0.6
    assert accuracy[10] >= 0.65


def test_a_fit_takes_milliseconds():
    features, prior = 10 * draw(10, 8, seed=1), torch.zeros(8)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        fit_user_weights(features, prior, beta=0.1, scale=1.0)
        times.append(time.perf_counter() - began)
    assert sorted(times)[4] < 0.05


def test_what_leaves_no_doubt_ends_where_the_prior_holds_it():
    """Answers that are thousands of nats apart, all to one side."""
    found = fit_user_weights(torch.full((50, 1), 1e4), torch.zeros(1), beta=0.1, scale=1.0)
    slope = -50 * 1e3 / (1 + math.exp(1e3 * float(found.mean))) + float(found.mean)
    assert abs(slope) < 1e-6
    assert 0 < float(found.mean) < 1
    with pytest.raises(ValueError, match="must be finite"):
        fit_user_weights(torch.tensor([[math.inf]]), torch.zeros(1), beta=0.1, scale=1.0)
