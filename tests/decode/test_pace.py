"""How far to draft: the length that pays by the measured costs, none where none pays, and lookups in the text."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.decode.drafters.lookup import DOUBTFUL, SHARES, Lookup
from trimtab.decode.pace import DRAWN, LADDER, Hope, Load, Looked, Pace, Steady, Tally


def run(pace, cost, acceptance, steps=200, sequences=1):
    """Steps of a machine on which drafting k tokens for that many sequences costs `cost(k)`; the lengths of the last ones."""
    chosen = []
    for _ in range(steps):
        load = Load(sequences, sequences)
        chosen.append(pace.choose(load, [Steady(acceptance)] * sequences))
        pace.observe(load, chosen[-1], cost(chosen[-1]))
    return chosen[-40:]


def best(cost, a):
    return max((k for k in LADDER if k <= DRAWN), key=lambda k: sum(a**i for i in range(k + 1)) / cost(k))


@pytest.mark.parametrize("acceptance", [0.1, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("slope", [0.02, 0.1, 0.3, 1.0])
def test_the_chosen_length_is_the_best_for_the_costs(acceptance, slope):
    chosen = run(Pace(), lambda k: 1 + slope * k, acceptance)
    common = max(set(chosen), key=chosen.count)
    assert common == best(lambda k: 1 + slope * k, acceptance)


def test_drafting_stops_where_it_does_not_pay():
    assert set(run(Pace(), lambda k: 1 + 0.3 * k, 0.15)) <= {0, 1}
    assert run(Pace(), lambda k: 1 + 0.3 * k, 0.15).count(0) >= 38


def test_a_cost_that_jumps_is_found_and_a_change_is_noticed():
    """Up to three rows are free and four cost double; later six are free."""
    pace = Pace()
    assert max(run(pace, lambda k: 1.0 if k < 3 else 2.5, 0.9)) == 2
    assert 6 in run(pace, lambda k: 1.0 if k < 7 else 4.0, 0.9, steps=1200)


def test_token_by_token_that_became_cheap_is_noticed_from_afar():
    """On a GPU first passes of a shape cost many times what later ones do; that must not decide for ever."""
    pace = Pace()
    assert set(run(pace, lambda k: 10 + 0.1 * k, 0.9)) <= {0, 6, 8}
    assert run(pace, lambda k: 10 + 0.1 * k if k else 1.0, 0.9, steps=600).count(0) >= 38


def test_costs_are_learned_apart_for_small_and_large_batches():
    pace = Pace()
    run(pace, lambda k: 1 + 0.05 * k, 0.8, sequences=1)
    run(pace, lambda k: 1 + 1.0 * k, 0.8, sequences=32)
    assert pace.choose(Load(1, 1), [Steady(0.8)]) >= 4
    assert pace.choose(Load(32, 32), [Steady(0.8)] * 32) == 0


def test_a_fixed_length_is_fixed_and_without_drafts_there_is_none():
    assert run(Pace(3), lambda k: 1 + 9 * k, 0.0, steps=40) == [3] * 40
    assert Pace().choose(Load(4, 0), []) == 0


def test_hope_believes_the_prior_until_there_is_evidence():
    hope = Hope()
    assert hope.estimate(0.6) == 0.6
    for _ in range(100):
        hope.observe(1, 5)
    assert hope.estimate(0.6) == pytest.approx(0.2, abs=0.02)
    for _ in range(200):
        hope.observe(5, 5)
    assert hope.estimate(0.6) > 0.75, "old evidence fades"


def test_a_tally_counts():
    tally = Tally()
    assert (tally.acceptance, tally.tokens_per_call) == (None, None)
    tally.observe(accepted=2, drafted=4)  # two stayed, the third failed
    tally.observe(accepted=4, drafted=4)
    tally.observe(accepted=0, drafted=0)
    assert tally == Tally(calls=3, tokens=9, drafted=8, tested=7, accepted=6)
    assert tally.acceptance == 6 / 7
    assert tally.tokens_per_call == 3.0


def test_drafts_that_are_known_are_weighed_by_their_own_odds():
    """Whoever copies gets long drafts, and a guess that is doubtful from its first token on none, at the same costs."""
    pace, load = Pace(), Load(1, 1)
    for _ in range(6):
        length = pace.choose(load, [Looked([0.9] * 16)])
        pace.observe(load, length, 1 + 0.2 * length)
    assert pace.choose(load, [Looked([0.99] * 16)]) == 16
    assert pace.choose(load, [Looked([0.99] * 5)]) == 5
    assert pace.choose(load, [Looked([0.99, 0.99, 0.05, 0.9])]) == 2
    assert pace.choose(load, [Looked([0.15, 0.9, 0.9])]) == 0
    assert pace.choose(load, [Looked([])]) == 0
    assert pace.choose(Load(2, 2), [Looked([]), Looked([0.9] * 3)]) in (0, 2), "a load of its own, not timed yet"
    assert Looked([0.5, 0.5]).tokens(2) == 1.75


def test_where_no_draft_is_worth_it_they_are_looked_up_seldom_until_one_is():
    pace, load = Pace(), Load(32, 32)
    for _ in range(50):
        pace.observe(load, pace.choose(load, [Looked([])] * 32), 1.0)
    looked = []
    for _ in range(80):
        looked.append(pace.longest(load))
        pace.observe(load, 0, 1.0)
    assert looked.count(16) == 10
    assert looked.count(0) == 70
    assert pace.longest(Load(1, 1)) == 16, "another load is another matter"
    pace.observe(load, 2, 1.0)
    assert pace.longest(load) == 16
    assert Pace(3).longest(load) == 3


def test_nothing_is_timed_that_nobody_drafts():
    pace, load = Pace(), Load(1, 1)
    for _ in range(30):
        length = pace.choose(load, [Looked([0.9])])
        assert length <= 1
        pace.observe(load, length, 1 + 0.01 * length)
    assert length == 1


def test_a_lookup_goes_on_as_the_text_did_after_its_longest_known_end():
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3])
    assert lookup.guess(3).tokens == [4, 9, 2]
    lookup.extend([5, 2, 3])
    assert lookup.guess(2).tokens == [5, 2], "the latest occurrence counts"
    assert lookup.guess(0).tokens == []
    assert Lookup([1, 2, 3]).guess(2).tokens == []
    assert Lookup([7, 7]).guess(3).tokens == [7, 7, 7]


def test_a_lookup_learns_its_odds_from_the_text_alone():
    """What is copied goes on, and what is found by one token that never came true does not."""
    copied, changing = Lookup([*range(50)]), Lookup([])
    copied.extend([*range(30)])
    assert copied.guess(3).tokens == [30, 31, 32]
    assert min(copied.guess(3).odds) > 0.8
    changing.extend([token for i in range(60) for token in (1000, i)])
    assert changing.guess(1).tokens == []
    changing.extend([1000])
    assert changing.guess(1).tokens == [59]
    assert changing.guess(1).odds[0] < 0.1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 8))
def test_guessing_several_tokens_is_guessing_one_accepting_it_and_guessing_again(text, count):
    (together, odds), growing = Lookup(text).guess(count), Lookup(text)
    for token in together:
        assert growing.guess(1).tokens == [token]
        growing.extend([token])
    assert len(together) == count or math.prod(odds) < 0.5 or not growing.guess(1).tokens
    assert all(0 < chance < 1 for chance in odds)


def test_a_chain_of_guesses_ends_where_it_is_doubtful():
    tokens, odds = Lookup([0, 0]).guess(9)
    assert tokens == [0] * 4
    assert math.prod(odds) >= DOUBTFUL > math.prod(odds) * SHARES[2]


def test_steps_of_bare_and_of_aligned_requests_are_timed_apart():
    """A bare step is cheap; that must not make token by token look cheap to those who could draft."""
    pace = Pace()
    for _ in range(40):
        bare, aligned = Load(1, 0), Load(1, 1)
        pace.observe(bare, pace.choose(bare, []), 1.0)
        length = pace.choose(aligned, [Steady(0.9)])
        pace.observe(aligned, length, 10.0 + 0.1 * length)
    assert pace.choose(Load(1, 1), [Steady(0.9)]) >= 6
