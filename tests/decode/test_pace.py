"""How far to draft: the length that pays by the measured costs, none where none pays, and lookups in the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.draw import NO_TOKEN
from trimtab.decode.drafters import Lookup
from trimtab.decode.pace import LADDER, Hope, Load, Pace, Tally


def run(pace, cost, acceptance, steps=200, sequences=1):
    """Steps of a machine on which drafting k tokens for that many sequences costs `cost(k)`; the lengths of the last ones."""
    chosen = []
    for _ in range(steps):
        load = Load(sequences, sequences)
        chosen.append(pace.choose(load, [acceptance] * sequences))
        pace.observe(load, chosen[-1], cost(chosen[-1]))
    return chosen[-40:]


def best(cost, a):
    return max(LADDER, key=lambda k: sum(a**i for i in range(k + 1)) / cost(k))


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
    assert pace.choose(Load(1, 1), [0.8]) >= 4
    assert pace.choose(Load(32, 32), [0.8] * 32) == 0


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


def test_a_lookup_goes_on_as_the_text_did_after_its_longest_known_end():
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3])
    assert lookup.drafts(3) == [4, 9, 2]
    lookup.extend([5, 2, 3])
    assert lookup.drafts(2) == [5, 2], "the latest occurrence counts"
    assert Lookup([1, 2, 3]).drafts(2) == [NO_TOKEN, NO_TOKEN]
    assert Lookup([7, 7]).drafts(3) == [7, 7, 7]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 8))
def test_a_draft_depends_on_what_stands_before_it_alone(text, count):
    """Drafting several at once is drafting one, accepting it, and drafting again."""
    together, one_by_one = Lookup(text).drafts(count), []
    growing = Lookup(text)
    for _ in range(count):
        one_by_one += growing.drafts(1)
        if one_by_one[-1] == NO_TOKEN:
            break
        growing.extend(one_by_one[-1:])
    assert together[: len(one_by_one)] == one_by_one
    assert set(together[len(one_by_one) :]) <= {NO_TOKEN}


def test_steps_of_bare_and_of_aligned_requests_are_timed_apart():
    """A bare step is cheap; that must not make token by token look cheap to those who could draft."""
    pace = Pace()
    for _ in range(40):
        bare, aligned = Load(1, 0), Load(1, 1)
        pace.observe(bare, pace.choose(bare, []), 1.0)
        length = pace.choose(aligned, [0.9])
        pace.observe(aligned, length, 10.0 + 0.1 * length)
    assert pace.choose(Load(1, 1), [0.9]) >= 6
