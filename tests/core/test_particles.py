"""Weights of particles against definitions written out, and resampling by its expectation over the uniform, which is exact."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from trimtab.core.draw import NO_TOKEN
from trimtab.core.noise import uniforms
from trimtab.core.particles import (
    Weights,
    choose,
    effective_size,
    estimate_log_z,
    even_weights,
    in_place,
    resample,
    reweigh,
    systematic,
)

INF = math.inf
CASES = {
    "even": [0.0, 0.0, 0.0, 0.0],
    "uneven": [0.0, -1.0, 0.5, -3.0, 2.0],
    "one lives": [-INF, -INF, 1.0],
    "some are dead": [-2.0, -INF, 0.3, -INF, 0.1, 0.2],
    "far apart": [0.0, -800.0, -1.0],
}


def number(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cells(logw: Tensor) -> list[tuple[float, float]]:
    """Where systematic resampling does not depend on its uniform: the middle and the length of each stretch of [0, 1)."""
    running = logw.softmax(-1).cumsum(-1) * len(logw)
    edges = sorted({0.0, 1.0, *(running % 1).tolist()})
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(edges) if high - low > 1e-9]


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_systematic_resampling_gives_each_particle_its_share_of_children_on_average(values):
    """E[children of i] = N·W_i, summed over every stretch of the uniform; and never more than one child away from it."""
    logw, mean = number(values), torch.zeros(len(values), dtype=torch.float64)
    share = len(values) * logw.softmax(-1)
    for middle, length in cells(logw):
        ancestors = systematic(logw, number(middle))
        assert ancestors.tolist() == sorted(ancestors.tolist())
        children = torch.bincount(ancestors, minlength=len(values)).double()
        assert ((children - share).abs() < 1 + 1e-9).all()
        mean += length * children
    assert_close(mean, share)


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_the_effective_size_is_that_of_the_definition(values):
    w = [math.exp(value - max(values)) for value in values]
    assert float(effective_size(number(values))) == pytest.approx(sum(w) ** 2 / sum(x * x for x in w))
    assert float(effective_size(number(values) + 1000)) == pytest.approx(sum(w) ** 2 / sum(x * x for x in w))


def test_survivors_stay_where_they_are():
    """Every list of ancestors of up to four particles: the same ones, each its own if it is among them at all."""
    for count in range(1, 5):
        every = torch.cartesian_prod(*[torch.arange(count)] * count).view(-1, count)
        placed = in_place(every)
        assert torch.equal(placed.sort(-1).values, every.sort(-1).values)
        for before, after in zip(every.tolist(), placed.tolist(), strict=True):
            assert all(after[i] == i for i in before)


def test_a_run_is_resampled_below_the_threshold_alone():
    rows = number([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -INF], [3.0, -INF, -INF, -INF], [-INF] * 4])
    weights = Weights(rows, number([0.0, 1.0, 2.0, 3.0]))
    half = torch.full((4,), 0.5, dtype=torch.float64)
    for threshold, happened in ((0.0, [0, 0, 0, 0]), (0.5, [0, 0, 1, 0]), (0.8, [0, 1, 1, 0]), (1.0, [0, 1, 1, 0])):
        found = resample(weights, half, threshold)
        assert found.happened.tolist() == [bool(one) for one in happened]
        for run, drawn in enumerate(happened):
            assert_close(estimate_log_z(found.weights)[run], estimate_log_z(weights)[run])
            own = found.ancestors[run].tolist() == [0, 1, 2, 3]
            assert own != bool(drawn)
            assert_close(found.weights.logw[run], torch.zeros(4, dtype=torch.float64) if drawn else rows[run])
    assert resample(weights, half, 1.0).ancestors[2].tolist() == [0, 0, 0, 0]


def test_each_run_of_a_batch_is_resampled_by_its_own_uniform():
    logw, uniform = uniforms([1], [0], [0], 5, 7)[0].log(), uniforms([2], [0], [0], 5, 1)[0, :, 0]
    together = resample(Weights(logw, logw.new_zeros(5)), uniform, 1.0)
    for run in range(5):
        alone = resample(Weights(logw[run], logw.new_zeros(())), uniform[run], 1.0)
        assert torch.equal(alone.ancestors, together.ancestors[run])
        assert_close(alone.weights.log_z, together.weights.log_z[run])


def test_the_estimate_is_the_product_of_mean_weights():
    weights = even_weights(1, 3)
    assert float(estimate_log_z(weights)) == 0
    weights = reweigh(reweigh(weights, number([[0.1, 0.2, 0.3]])), number([[0.0, -INF, 1.0]]))
    first = (math.exp(0.1) + math.exp(1.3)) / 3
    assert float(estimate_log_z(weights)) == pytest.approx(math.log(first))
    weights = reweigh(resample(weights, number([0.3]), 1.0).weights, number([[-1.0, -2.0, -3.0]]))
    assert float(estimate_log_z(weights)) == pytest.approx(math.log(first * sum(map(math.exp, (-1, -2, -3))) / 3))


def test_a_particle_is_chosen_by_its_weight():
    logw = number([0.25, 0.5, 0.0, 0.25]).log()
    assert [int(choose(logw, number(u))) for u in (0.0, 0.24, 0.26, 0.74, 0.76, 0.99)] == [0, 0, 1, 1, 3, 3]
    assert int(choose(number([-INF, -INF]), number(0.5))) == NO_TOKEN
