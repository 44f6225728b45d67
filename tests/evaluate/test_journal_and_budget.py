"""A journal survives what happens to files, and a budget holds before the money is spent."""

import json
import threading

import pytest

from trimtab.errors import DataError, InvalidOption
from trimtab.journal import Journal, key_of
from trimtab.judges.budget import Budget, Size


def test_what_was_added_is_there_the_next_time(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", {"x": 1})
        journal.add_all({"b": {"x": "é\u2028\ud800"}, "a": {"x": 2}})
    with Journal(tmp_path / "j.jsonl") as journal:
        assert (journal["a"], journal.get("b"), journal.get("c")) == ({"x": 2}, {"x": "é\u2028\ud800"}, None)
        assert len(journal) == 2


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_torn_last_line_is_cut_off_and_the_rest_stays(tmp_path, cut):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add("a", {"x": 1})
        journal.add("b", {"x": 2})
    data = (tmp_path / "j.jsonl").read_bytes()
    first = data.index(b"\n") + 1
    (tmp_path / "j.jsonl").write_bytes(data[: max(first, len(data) - cut)])
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal["a"] == {"x": 1}
        assert journal.get("b") is None
        journal.add("b", {"x": 3})
    lines = (tmp_path / "j.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b"]


@pytest.mark.parametrize("content", ["nonsense\n", "[1]\n", '{"x": 1}\n', '"a"\n'])
def test_another_file_is_not_taken_for_a_journal(tmp_path, content):
    (tmp_path / "j.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"j\.jsonl:1: is no line of a journal"), Journal(tmp_path / "j.jsonl"):
        pass
    assert (tmp_path / "j.jsonl").read_text(encoding="utf-8") == content


def test_one_process_at_a_time_has_it(tmp_path):
    with Journal(tmp_path / "j.jsonl"), pytest.raises(InvalidOption, match="another process"), Journal(tmp_path / "j.jsonl"):
        pass


def test_threads_may_add_at_once(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        threads = [threading.Thread(target=lambda i=i: journal.add(str(i), {"i": i})) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Journal(tmp_path / "j.jsonl") as journal:
        assert [journal[str(i)] for i in range(40)] == [{"i": i} for i in range(40)]


def test_keys_tell_questions_apart_and_nothing_else():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": "1"})
    assert key_of("\ud800") != key_of("\ud801")


SIZE = Size(prompt_bytes=100, max_tokens=10)


def test_a_request_is_reserved_at_a_token_a_byte_until_the_endpoint_has_counted():
    """Price 1 a token to read and 2 to write: at most 100 + 20. Then 50 tokens were counted for 100 bytes: 62.5 + 20."""
    budget = Budget(1e6, 2e6, 250.0)
    assert budget.reserve("a", SIZE)
    assert budget.reserve("b", SIZE)
    assert not budget.reserve("c", SIZE)
    budget.settle("a", SIZE, {"prompt_tokens": 50, "completion_tokens": 1})
    assert budget.amount == pytest.approx(52.0)
    assert budget.reserve("c", SIZE)  # 52 spent, 82.5 set aside for b, and 82.5 more
    assert not budget.reserve("d", SIZE)
    budget.release("b")
    assert budget.reserve("d", SIZE)
    assert not budget.reserve("e", SIZE)


def test_what_is_in_flight_is_weighed_anew_with_what_is_learned():
    """Three at a token a byte fit into 360. Then 300 tokens and 50 to write were counted for 100 bytes: each may cost 475."""
    budget = Budget(1e6, 2e6, 1800.0)
    assert all(budget.reserve(key, SIZE) for key in "abc")
    budget.settle("a", SIZE, {"prompt_tokens": 300, "completion_tokens": 50})
    assert budget.reserve("d", SIZE) is False  # 400 spent, and three of them: 400 + 3 · 475 = 1825
    budget.release("b")
    assert budget.reserve("d", SIZE)


def test_a_try_that_came_to_nothing_may_have_cost_something():
    budget = Budget(1e6, 2e6, 1000.0)
    budget.lose(SIZE)
    assert budget.amount == pytest.approx(120.0)
    assert (budget.requests, budget.uncounted) == (0, 1)


def test_the_order_in_which_things_are_booked_is_nothing():
    """A restart books answers and lost tries in another order than they came in."""
    counted = {"prompt_tokens": 20, "completion_tokens": 30}
    one, other = Budget(1e6, 2e6, None), Budget(1e6, 2e6, None)
    one.lose(SIZE)
    one.lose(SIZE)
    one.settle("a", SIZE, counted)
    other.settle("a", SIZE, counted)
    other.lose(Size(200, 20), 2)
    assert one.report() == other.report()
    assert one.amount == pytest.approx(20 + 60 + 2 * (25 + 60))


def test_what_is_still_set_aside_in_the_end_counts_as_lost():
    budget = Budget(1e6, 2e6, None)
    budget.reserve("a", SIZE)
    budget.reserve("b", Size(50, 10))
    assert budget.abandon() == [SIZE, Size(50, 10)]
    assert budget.amount == pytest.approx(150 + 40)
    assert budget.abandon() == []
    assert budget.uncounted == 2


def test_an_answer_that_was_not_counted_costs_what_was_set_aside():
    budget = Budget(1e6, 0.0, 1000.0)
    budget.reserve("a", SIZE)
    budget.settle("a", SIZE, None)
    assert budget.report() == {
        "requests": 1,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "uncounted": 1,
        "amount": pytest.approx(100.0),
    }


def test_without_a_limit_everything_is_allowed_and_without_prices_nothing_is_summed():
    budget = Budget(None, None, None)
    assert budget.reserve("a", SIZE)
    budget.settle("a", SIZE, {"prompt_tokens": 5, "completion_tokens": 1})
    assert budget.report()["amount"] is None


@pytest.mark.parametrize(
    ("prices", "complaint"),
    [
        ((None, None, 1.0), "max_cost needs prompt_price"),
        ((None, 1.0, 1.0), "max_cost needs prompt_price and completion_price"),
        ((-1.0, None, None), "prompt_price must be a number of at least 0, not -1.0"),
        ((1.0, float("nan"), None), "completion_price must be"),
        ((1.0, 1.0, float("inf")), "max_cost must be"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(prices, complaint):
    with pytest.raises(InvalidOption, match=complaint):
        Budget(*prices)
