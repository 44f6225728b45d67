"""An endpoint as judge: each question asked once, whatever the endpoint does, and every trick of its order cancelled."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from scripted import Reply, scripted
from trimtab.endpoints.settings import Limits
from trimtab.errors import BudgetExceeded, EndpointError, InvalidOption
from trimtab.evaluate.contests import position_report
from trimtab.journal import Journal
from trimtab.judges.base import Judgement, Pair
from trimtab.judges.budget import Budget
from trimtab.judges.endpoint import EndpointJudge

QUICK = Limits(concurrency=8, request_timeout=5, max_retries=3, backoff=0.02)


def pairs_of(count):
    """Pairs whose second answer is worth `i % 5` tenths more, which a fair judge can read off it."""
    return [Pair(f"q{i}", f"q{i}", f"{i} worth 5", f"{i} is worth {5 + i % 5}") for i in range(count)]


def shown(asked):
    """The two outputs of a question, in the order that they are shown in."""
    lines = asked.body["messages"][-1]["content"].split("\n")
    return [json.loads(line)["output"] for line in lines if line.startswith('{"model"')]


def worths(asked):
    return [int(re.search(r"worth (\d+)", text).group(1)) for text in shown(asked)]


def fair(asked, number=0):
    """P(first) = σ(worth of the first − worth of the second)."""
    first, second = worths(asked)
    return graded(1 / (1 + math.exp(second - first)))


def graded(p, usage=True, delay=0.0):
    entries = [{"token": name, "logprob": math.log(max(q, 1e-30))} for name, q in (("m", p), ("M", 1 - p))]
    steps = [{"token": "m" if p > 0.5 else "M", "logprob": math.log(max(p, 1 - p)), "top_logprobs": entries}]
    body = {"choices": [{"index": 0, "message": {"content": "m" if p > 0.5 else "M"}, "logprobs": {"content": steps}}]}
    return Reply(body | ({"usage": {"prompt_tokens": 100, "completion_tokens": 1}} if usage else {}), delay=delay)


def words(text):
    return Reply({"choices": [{"message": {"content": text}}]})


def judged(respond, pairs, path, **settings):
    """The judgements, and the script."""
    with scripted(respond, models=[{"id": "judge"}]) as server, Journal(path) as journal:
        judge = EndpointJudge(server.url, **{"limits": QUICK, **settings})
        return judge.judge(pairs, journal), server, judge


def right(pairs, found):
    """Whether the preferences are what a fair judge says."""
    for i, (_, one) in enumerate(zip(pairs, found, strict=True)):
        assert one.preference == pytest.approx(1 + 1 / (1 + math.exp(-(i % 5)))), i
        if one.orders is not None:
            assert one.orders == pytest.approx((one.preference, one.preference))


def test_each_pair_is_asked_in_both_orders_and_the_preference_is_the_seconds(tmp_path):
    pairs = pairs_of(30)
    found, server, judge = judged(fair, pairs, tmp_path / "j.jsonl")
    right(pairs, found)
    assert len(server.asked) == 60
    assert server.most_in_flight <= 8
    assert Counter(tuple(sorted(shown(asked))) for asked in server.asked).most_common(1)[0][1] == 2
    body = server.asked[0].body
    assert body["model"] == judge.name == "judge"
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0.0, True, 5)
    assert judge.cost() == {
        "requests": 60,
        "prompt_tokens": 6000,
        "completion_tokens": 60,
        "uncounted": 0,
        "amount": None,
    }


def test_nothing_is_asked_twice(tmp_path):
    """Not in the next run, not for a pair that comes twice, and not for answers that are the same."""
    pairs = [*pairs_of(6), *pairs_of(6), Pair("q", "q", "same worth 1", "same worth 1")]
    found, server, _ = judged(fair, pairs, tmp_path / "j.jsonl")
    assert len(server.asked) == 12
    assert found[:6] == found[6:12]
    assert found[12] == Judgement(1.5)
    again, server, judge = judged(fair, pairs, tmp_path / "j.jsonl")
    assert again == found
    assert server.asked == []
    assert judge.cost()["requests"] == 12  # what the earlier run asked counts


def test_a_judge_that_always_takes_the_first_prefers_nobody(tmp_path):
    """And the report says that it goes by the order alone."""
    found, _, _ = judged(lambda asked, number: words("m"), pairs_of(20), tmp_path / "j.jsonl")
    assert [one.preference for one in found[1:5]] == [1.5] * 4
    report = position_report(found)
    assert report["first_preferred"] == 100.0
    assert report["consistent"] == 0.0


def test_the_position_report_worked_out_by_hand():
    """Shown first, the first answer is preferred by .75 and .5, the second by .25 and 1: the mean is .625.

    Orders agree in the first pair (1.25 and 1.25 both favour the first answer), not in the second (a draw, and 2).
    """
    report = position_report([Judgement(1.25, (1.25, 1.25)), Judgement(1.75, (1.5, 2.0)), Judgement(None), Judgement(1.5)])
    assert report["pairs"] == 2
    assert report["first_preferred"] == pytest.approx(62.5)
    assert report["consistent"] == 50.0
    assert position_report([Judgement(1.5)]) is None


def test_one_random_order_costs_half_and_mixes_the_orders(tmp_path):
    pairs = pairs_of(40)
    found, server, _ = judged(fair, pairs, tmp_path / "j.jsonl", orders="random")
    right(pairs, found)
    assert len(server.asked) == 40
    swapped = sum(worths(asked)[0] > worths(asked)[1] for asked in server.asked if worths(asked)[0] != worths(asked)[1])
    assert 6 <= swapped <= 26  # of 32; a fair coin is outside of this once in 5,000


def test_a_judge_that_fails_in_every_way_is_asked_until_it_answers(tmp_path):
    """Busy, broken, silent, speechless, dropped, each the first time that a question comes."""
    pairs = pairs_of(25)
    seen, lock = Counter(), threading.Lock()

    def respond(asked, number):
        key = json.dumps(asked.body["messages"])
        with lock:
            seen[key] += 1
            first = seen[key] == 1
        kind = sum(key.encode()) % 7
        if not first or kind == 6:
            return fair(asked)
        return [
            Reply({"error": {"message": "later"}}, status=429, headers={"retry-after": "0"}),
            Reply({"error": {"message": "oh"}}, status=500),
            Reply(text="{not json"),
            words("I would rather not say"),
            Reply(drop=True),
            Reply({"choices": "none"}),
        ][kind]

    limits = Limits(concurrency=8, request_timeout=5, max_retries=60, backoff=0.001)
    found, server, _ = judged(respond, pairs, tmp_path / "j.jsonl", limits=limits)
    right(pairs, found)
    assert set(seen.values()) == {1, 2}
    assert len(server.asked) > 70


def test_a_judge_that_hangs_is_asked_again(tmp_path):
    slow = {"first": True}

    def respond(asked, number):
        if slow.pop("first", False):
            return graded(0.5, delay=3.0)
        return fair(asked)

    pairs = pairs_of(4)
    started = time.monotonic()
    found, _, _ = judged(respond, pairs, tmp_path / "j.jsonl", limits=Limits(8, 0.5, 3, 0.02))
    right(pairs, found)
    assert time.monotonic() - started < 3


def test_a_question_without_an_answer_counts_as_missing_and_ends_nothing(tmp_path):
    """Nonsense three times, or a refusal: the pair has no preference, the others have theirs. There is no fourth time."""
    pairs = pairs_of(10)

    def respond(asked, number):
        text = shown(asked)[0]
        if text.startswith("3 "):
            return words("hmm")
        if text.startswith("4 "):
            return Reply({"error": {"message": "content filter"}}, status=400)
        return fair(asked)

    found, server, _ = judged(respond, pairs, tmp_path / "j.jsonl")
    assert [i for i, one in enumerate(found) if one.preference is None] == [3, 4]
    assert found[3].why_missing == "no verdict in 'hmm'"
    assert "content filter" in found[4].why_missing
    counts = Counter(shown(asked)[0].split()[0] for asked in server.asked)
    assert (counts["3"], counts["4"], counts["5"]) == (6, 2, 2)
    again, server, _ = judged(respond, pairs, tmp_path / "j.jsonl")
    assert [one.preference for one in again] == [one.preference for one in found]
    assert {shown(asked)[0].split()[0] for asked in server.asked} == {"4"}  # a refusal may be over the next time


@pytest.mark.parametrize("field", ["logprobs", "max_tokens", "temperature"])
def test_a_field_that_the_endpoint_does_not_take_is_left_out(tmp_path, field, caplog):
    def respond(asked, number):
        if field in asked.body:
            return Reply({"error": {"message": f"Unsupported parameter: '{field}'", "param": field}}, status=400)
        first, second = worths(asked)
        return words("m" if first >= second else "M")

    found, server, judge = judged(respond, pairs_of(6), tmp_path / "j.jsonl")
    assert [one.preference for one in found] == [1.5, 2.0, 2.0, 2.0, 2.0, 1.5]
    assert len(server.asked) == 13  # one was refused
    assert field not in judge.describe()
    assert ("max_completion_tokens" in server.asked[-1].body) == (field == "max_tokens")
    assert f"does not take {field}: going on without" in caplog.text


@pytest.mark.parametrize(("status", "asked"), [(401, 1), (404, 1), (400, 20)])
def test_an_endpoint_that_refuses_everything_ends_the_run_at_once(tmp_path, status, asked):
    answer = Reply({"error": {"message": "no such model"}}, status=status)
    with scripted(lambda *_: answer, models=[{"id": "judge"}]) as server, Journal(tmp_path / "j.jsonl") as journal:
        with pytest.raises(EndpointError, match="no such model"):
            EndpointJudge(server.url, limits=QUICK).judge(pairs_of(20), journal)
        assert len(server.asked) == asked


def test_an_endpoint_that_goes_away_ends_the_run_and_what_it_said_is_kept(tmp_path):
    pairs = pairs_of(30)

    def respond(asked, number):
        return fair(asked) if number < 20 else Reply({"error": {"message": "down"}}, status=500)

    with pytest.raises(EndpointError, match=r"no endpoint is left|failed"):
        judged(respond, pairs, tmp_path / "j.jsonl", limits=Limits(4, 5, 2, 0.01))
    found, server, _ = judged(fair, pairs, tmp_path / "j.jsonl")
    right(pairs, found)
    assert len(server.asked) <= 60 - 20 + 4


def test_a_cost_cap_holds_and_the_rest_can_be_bought_later(tmp_path):
    """Each question costs 100 tokens at 1 a token, and 1 to write: the cap of 1,500 allows fourteen, whatever is in flight."""
    pairs = pairs_of(20)
    with pytest.raises(BudgetExceeded, match=r"judge has cost 1\d\d\d of max_cost 1500, with \d+ of 40 questions left"):
        judged(fair, pairs, tmp_path / "j.jsonl", budget=Budget(1e6, 1e6, 1500.0))
    lines = len((tmp_path / "j.jsonl").read_text(encoding="utf-8").splitlines())
    assert 10 <= lines <= 14
    found, server, judge = judged(fair, pairs, tmp_path / "j.jsonl", budget=Budget(1e6, 1e6, 9000.0))
    right(pairs, found)
    assert len(server.asked) == 40 - lines
    assert judge.cost()["amount"] == pytest.approx(40 * 101)


def test_bad_settings_are_refused_before_anything_is_sent():
    with pytest.raises(InvalidOption, match="criterion must be one of helpful, harmless, summary, not 'nice'"):
        EndpointJudge("http://localhost:1", criterion="nice")
    with pytest.raises(InvalidOption, match="orders must be one of both, random"):
        EndpointJudge("http://localhost:1", orders="second")
    with pytest.raises(InvalidOption, match="is no endpoint"):
        EndpointJudge("ftp://x")


@pytest.mark.parametrize(
    ("message", "more", "lacks"),
    [
        ("Logprobs is not supported for this model", {}, "logprobs"),
        ("Logprobs is not enabled for models/x", {}, "logprobs"),
        ("You are not allowed to request logprobs from this model", {"status": 403}, "logprobs"),
        ("Unsupported parameter", {"param": "logprobs"}, "logprobs"),
        ("logprobs is not implemented", {"status": 501}, "logprobs"),
        (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
            {},
            "max_tokens",
        ),
        (
            "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is supported.",
            {},
            "temperature",
        ),
        ("System role not supported", {}, "system"),
        ("Conversation roles must alternate user/assistant/user/assistant/...", {}, "system"),
    ],
)
def test_the_words_that_servers_refuse_a_field_with(tmp_path, message, more, lacks):
    """Refused until the request is without it."""

    def respond(asked, number):
        roles = [one["role"] for one in asked.body["messages"]]
        if lacks in asked.body or lacks in roles:
            return Reply({"error": {"message": message, "param": more.get("param")}}, status=more.get("status", 400))
        first, second = worths(asked)
        return words("m" if first >= second else "M")

    found, server, _ = judged(respond, pairs_of(5), tmp_path / "j.jsonl", limits=Limits(8, 5, 1, 0.01))
    assert [one.preference for one in found] == [1.5, 2.0, 2.0, 2.0, 2.0]
    assert len(server.asked) <= 12


def test_where_five_alternatives_are_too_many_two_are_asked_for(tmp_path):
    def respond(asked, number):
        if asked.body["top_logprobs"] > 3:
            message = "Requested sample logprobs of 5, which is greater than max allowed: 3"
            return Reply({"error": {"message": message}}, status=400)
        return fair(asked)

    pairs = pairs_of(5)
    found, _, judge = judged(respond, pairs, tmp_path / "j.jsonl")
    right(pairs, found)
    assert judge.describe()["top_logprobs"] == 2


@pytest.mark.parametrize("poison", [0, 7, 29])
@pytest.mark.parametrize("how", ["500", "drop", "junk", "error200"])
def test_one_question_that_cannot_be_answered_ends_nothing(tmp_path, how, poison):
    """Whichever it is, and again in the next run, which asks for it alone."""
    replies = {
        "500": Reply({"error": {"message": "assertion failed"}}, status=500),
        "drop": Reply(drop=True),
        "junk": Reply(text="<html>"),
        "error200": Reply({"error": {"message": "no", "code": 400}}),
    }

    def respond(asked, number):
        return replies[how] if shown(asked)[0].startswith(f"{poison} worth") else fair(asked)

    pairs = pairs_of(30)
    for _ in range(2):
        found, server, _ = judged(respond, pairs, tmp_path / "j.jsonl", limits=Limits(8, 5, 2, 0.005))
        assert [i for i, one in enumerate(found) if one.preference is None] == [poison]
    assert {shown(asked)[0].split()[0] for asked in server.asked} == {str(poison)}


@pytest.mark.parametrize("filtered", [range(3), range(27, 30)])
def test_some_refusals_end_nothing_whenever_they_come(tmp_path, filtered):
    """A content filter on the first pairs, or on the last; the next run meets nothing else."""

    def respond(asked, number):
        if int(shown(asked)[0].split()[0]) in filtered:
            return Reply({"error": {"message": "content_filter"}}, status=400)
        return fair(asked)

    for _ in range(2):
        found, server, _ = judged(respond, pairs_of(30), tmp_path / "j.jsonl")
        assert [i for i, one in enumerate(found) if one.preference is None] == list(filtered)
    assert len(server.asked) == 6


def test_a_judge_that_never_names_an_output_is_asked_for_no_more(tmp_path):
    def respond(asked, number):
        return words("<think> well")

    with pytest.raises(EndpointError, match="names neither output, such as in '<think> well': let it write more"):
        judged(respond, pairs_of(200), tmp_path / "j.jsonl")
    assert len((tmp_path / "j.jsonl").read_text(encoding="utf-8").splitlines()) <= 40


def test_a_judge_that_falls_silent_is_noticed_though_it_has_spoken(tmp_path):
    with pytest.raises(EndpointError, match="names neither output"):
        judged(lambda asked, number: fair(asked) if number < 3 else words("hm"), pairs_of(300), tmp_path / "j.jsonl")
    lines = (tmp_path / "j.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 3 + 60 + 2 * 8  # of each of eight askers one that is in flight, and one begun before the rest stopped


def test_what_had_no_room_is_asked_again_with_more(tmp_path):
    """Three tries with 4 tokens, and the fourth with 1,000; a run with as little again asks nothing."""
    pairs = pairs_of(4)

    def respond(asked, number):
        long = shown(asked)[0].startswith("2 ") and asked.body["max_tokens"] < 100
        return words("Let me think") if long else fair(asked)

    found, server, _ = judged(respond, pairs, tmp_path / "j.jsonl")
    assert found[2].preference is None
    assert len(server.asked) == 6 + 2 * 3
    _, server, _ = judged(respond, pairs, tmp_path / "j.jsonl")
    assert server.asked == []
    found, server, judge = judged(respond, pairs, tmp_path / "j.jsonl", max_tokens=1000)
    right(pairs, found)
    assert len(server.asked) == 2
    assert judge.cost()["requests"] == 14


def test_a_restart_changes_no_bill(tmp_path):
    """Lost tries, answers without a count, and what another question was in flight for: the same sum after a reload."""

    def respond(asked, number):
        return Reply({"error": {"message": "x"}}, status=500) if number % 3 == 1 else fair(asked)

    limits = Limits(4, 5, 9, 0.001)
    _, _, judge = judged(respond, pairs_of(8), tmp_path / "j.jsonl", limits=limits, budget=Budget(1e6, 1e6, None))
    _, server, again = judged(respond, pairs_of(8), tmp_path / "j.jsonl", limits=limits, budget=Budget(1e6, 1e6, None))
    assert server.asked == []
    assert again.cost() == pytest.approx(judge.cost())
    assert again.cost()["uncounted"] > 3


def test_a_judge_that_thinks_is_given_room(tmp_path):
    def respond(asked, number):
        assert asked.body["max_tokens"] == 500
        first, second = worths(asked)
        return words(f"<think>m or M?</think>\n{'m' if first >= second else 'M'}")

    found, _, _ = judged(respond, pairs_of(5), tmp_path / "j.jsonl", max_tokens=500)
    assert [one.preference for one in found] == [1.5, 2.0, 2.0, 2.0, 2.0]


def test_what_another_endpoint_said_under_the_same_name_is_kept_and_told(tmp_path, caplog):
    pairs = pairs_of(5)
    first, _, _ = judged(fair, pairs, tmp_path / "j.jsonl")
    second, server, judge = judged(lambda asked, number: words("m"), pairs, tmp_path / "j.jsonl")
    assert second == first
    assert server.asked == []
    assert "answers of a model of this name at http://127.0.0.1" in caplog.text
    assert len(judge.describe()["also_answered_at"]) == 1
    _, server, _ = judged(fair, pairs, tmp_path / "j.jsonl", model="other")
    assert len(server.asked) == 10


def test_a_cap_counts_what_earlier_contests_have_cost(tmp_path):
    """Ten questions of other pairs cost 1,010 of the 1,500 that four more fit into."""
    judged(fair, pairs_of(5), tmp_path / "j.jsonl")
    others = [Pair("p", f"p{i}", f"{i} worth 3", f"{i} is worth 4") for i in range(20)]
    with pytest.raises(BudgetExceeded):
        judged(fair, others, tmp_path / "j.jsonl", budget=Budget(1e6, 1e6, 1500.0))
    assert len((tmp_path / "j.jsonl").read_text(encoding="utf-8").splitlines()) <= 14


def test_a_cap_learns_from_tokens_that_are_many(tmp_path):
    """Five tokens a byte and fifty to write, where at most one and four were expected: passed by what was in flight alone."""

    def respond(asked, number):
        size = len(json.dumps(asked.body["messages"], ensure_ascii=False).encode())
        body = {"choices": [{"message": {"content": "M"}}], "usage": {"prompt_tokens": 5 * size, "completion_tokens": 50}}
        return Reply(body)

    with scripted(respond, models=[{"id": "judge"}]) as server, Journal(tmp_path / "j.jsonl") as journal:
        judge = EndpointJudge(server.url, limits=QUICK, budget=Budget(1.0, 1.0, 0.02))
        with pytest.raises(BudgetExceeded):
            judge.judge(pairs_of(30), journal)
        spent = judge.cost()["amount"]
        assert spent == pytest.approx(
            sum(5 * len(json.dumps(p["messages"]).encode()) + 50 for p in server.posts()) / 1e6, rel=0.02
        )
    assert spent <= 0.02


def test_lost_tries_count_against_the_cap(tmp_path):
    """Every other answer is broken, and may have been billed all the same."""

    def respond(asked, number):
        return Reply(text="{") if number % 2 else fair(asked)

    with pytest.raises(BudgetExceeded):
        judged(respond, pairs_of(30), tmp_path / "j.jsonl", limits=Limits(4, 5, 9, 0.001), budget=Budget(1e6, 1e6, 3000.0))
    with Journal(tmp_path / "j.jsonl") as journal:
        answers = [answer for _, answer in journal.items()]
    assert len([answer for answer in answers if "first" in answer]) < 20
    with pytest.raises(BudgetExceeded, match=r"has cost (2[5-9]|3\d)\d\d of max_cost 3000"):  # the next run knows of them
        judged(fair, pairs_of(30), tmp_path / "j.jsonl", limits=Limits(4, 5, 9, 0.001), budget=Budget(1e6, 1e6, 3000.0))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
sys.path.insert(0, {here!r})
from test_endpoint_judge import pairs_of
from trimtab.endpoints.settings import Limits
from trimtab.judges.endpoint import EndpointJudge
from trimtab.journal import Journal
with Journal({path!r}) as journal:
    judge = EndpointJudge({url!r}, limits=Limits(concurrency=8, request_timeout=20, max_retries=3, backoff=0.02))
    found = judge.judge(pairs_of({count}), journal)
print(sum(one.preference is not None for one in found))
"""


def test_killed_three_times_each_pair_is_judged_once(tmp_path):
    """A thousand pairs, two orders each, eight in flight, `kill -9` three times: one judgement for each question, in the end,
    and no question answered twice but for what was in flight when the process died."""
    count, answered, lock = 1000, Counter(), threading.Lock()

    def respond(asked, number):
        with lock:
            answered[json.dumps(asked.body["messages"])] += 1
        return fair(asked)

    here = os.path.dirname(__file__)
    with scripted(respond, models=[{"id": "judge"}]) as server:
        path = str(tmp_path / "j.jsonl")
        text = SCRIPT.format(tests=os.path.dirname(here), here=here, path=path, url=server.url, count=count)
        for stop in (300, 900, 1500):
            process = subprocess.Popen([sys.executable, "-c", text])
            while len(server.asked) < stop and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
        assert server.most_in_flight <= 8
    assert done.stdout.strip() == str(count)
    assert len(answered) == 2 * count
    assert sum(answered.values()) - 2 * count <= 3 * 8
    keys = [json.loads(line)["key"] for line in (tmp_path / "j.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(keys) == len(set(keys)) == 2 * count
