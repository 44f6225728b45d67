"""When to refit: the CUSUM by its recursion, its false alarms under laws that it knows nothing of, and `--refit_when`."""

import math
import random

import pytest
import torch

from trimtab.core.drift import cusum, limit_of, standing
from trimtab.errors import InvalidOption
from trimtab.loop.trigger import Drift, Every, parse_trigger


def losses(count, seed, shift=0.0):
    """Of answers: skewed, as losses a token are."""
    draw = random.Random(seed)
    return [math.exp(draw.gauss(0.3, 0.4)) + shift for _ in range(count)]


def test_the_sum_is_its_recursion():
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cusum(z)
    for row, got in zip(z.tolist(), found.tolist(), strict=True):
        s = 0.0
        for x, want in zip(row, got, strict=True):
            s = max(0.0, s + x - 0.5)
            assert s == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("count", [25, 200])
def test_false_alarms_are_as_rare_as_is_said(count):
    """Over references and streams of one law, drawn anew: the rate is the stated one, within what 1,000 draws can tell."""
    wanted, draws = 0.1, 1000
    limit = limit_of(count, 30, 120, wanted)
    assert limit.false_alarms == pytest.approx(wanted, abs=0.03)
    drawn = torch.tensor([losses(count + 120, i) for i in range(draws)])
    stream = cusum(standing(drawn[:, count:], drawn[:, :count]))[:, 29:]
    rate = float((stream > limit.height).any(-1).double().mean())
    assert abs(rate - wanted) <= 4 * math.sqrt(2 * wanted * (1 - wanted) / draws)


def test_where_a_loss_stands_is_counted_by_hand():
    """Among (1, 2, 2, 5): below all 1/2 of 5, between 1 1/2, a tie with two 2 1/2, above all 4 1/2."""
    found = standing(torch.tensor([0.0, 1.5, 2.0, 9.0]), torch.tensor([5.0, 2.0, 1.0, 2.0]))
    assert found.tolist() == pytest.approx([math.sqrt(12) * (rank / 5 - 0.5) for rank in (0.5, 1.5, 2.5, 4.5)])


def test_a_drift_is_found_soon():
    limit = limit_of(200, 30, 500, 0.01)
    spread = torch.tensor(losses(200, 1)).std().item()
    stream = cusum(standing(torch.tensor(losses(40, 2) + losses(60, 3, shift=1.5 * spread)), torch.tensor(losses(200, 1))))
    at = int((stream > limit.height).double().argmax())
    assert bool((stream > limit.height).any())
    assert 40 <= at < 70


def test_between_least_and_most():
    drift, reference = Drift(false_alarms=0.05, least=10, most=30), losses(60, 1)
    calm, shifted = losses(20, 5), losses(20, 6, shift=3.0)
    assert not drift.asks(9, shifted[:9], reference)["fires"]  # however far
    assert drift.asks(30, losses(30, 7), reference)["fires"]  # however calm
    told = drift.asks(20, shifted, reference)
    assert told["fires"]
    assert told["at"] == 10
    assert told["simulated_false_alarms"] == pytest.approx(0.05, abs=0.03)
    told = drift.asks(20, calm, reference)
    assert not told["fires"]
    assert "no drift" in told["why"]


def test_without_a_reference_the_first_votes_are_enough_and_a_small_one_tells_nothing():
    drift = Drift(least=10, most=30)
    assert drift.asks(10, losses(10, 1), [])["fires"]
    told = drift.asks(10, losses(10, 1, shift=9.0), losses(5, 2))
    assert not told["fires"]
    assert "too few to tell a drift by" in told["why"]


def test_votes_that_cannot_be_scored_are_no_losses():
    """Fewer losses than votes, or none: no round before `most`, and no crash."""
    drift = Drift(least=10, most=30)
    assert not drift.asks(20, [], losses(40, 1))["fires"]
    assert not drift.asks(20, losses(9, 2, shift=9.0), losses(40, 1))["fires"]
    assert drift.asks(30, [], losses(40, 1))["fires"]


def test_a_text_says_when():
    assert parse_trigger("every(n=50)") == Every(50)
    assert parse_trigger(" every ") == Every(1)
    assert parse_trigger("drift(false_alarms=0.05,most=300)") == Drift(0.05, 50, 300)
    assert not Every(3).asks(2, [], [])["fires"]
    assert Every(3).asks(3, [], [])["fires"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("often", "must be every"),
        ("drift(least=5", "must be every"),
        ("drift(leest=5)", "has no further setting 'leest'; it has: false_alarms, least, most"),
        ("every(n=2, n=3)", "gives it twice"),
        ("every(n=1.5)", "wants n as int"),
        ("every(n=0)", "n must be from 1 to"),
        ("drift(false_alarms=2)", "false_alarms must be at least 0.002 and below 1"),
        ("drift(least=9, most=9)", "most must be above least, which is 9, not 9"),
    ],
)
def test_what_says_no_time_is_refused(text, message):
    with pytest.raises(InvalidOption, match=message):
        parse_trigger(text)
