"""Votes: how they are read, what becomes of repeats, contradictions, floods and length."""

import json
import random
import time

import pytest

from tiny_task import write_rows
from trimtab.core.intervals import binomial_interval, sign_interval
from trimtab.data.records import Record
from trimtab.errors import DataError
from trimtab.loop.sift import cap_of, sift, told_apart
from trimtab.loop.votes import Vote, normal, read_said

LONG = "the quick brown fox jumps over the lazy dog and runs away"


def vote(prompt="p", chosen="a good answer", rejected="a bad one here", key="k", n=0, weight=1.0):
    return Vote(Record(prompt, chosen, rejected, f"d:{n}", weight=weight), key, f"{prompt} {chosen} {key} {n}")


def pairs(votes, **settings):
    found = sift(votes, **settings)
    return [(r.prompt, r.chosen, r.weight) for r in found.records], found.figures


def test_a_key_counts_once_for_a_pair_and_keys_add_up():
    """The frequency of a pair is how many people say so; spelling is none of it."""
    votes = [vote(key="a"), vote("P!", "A good answer.", key="a", n=1), vote(key="b"), vote(key="c")]
    found, figures = pairs(votes)
    assert found == [("p", "a good answer", 3.0)]
    assert figures["repeated"] == 1
    assert figures["votes"] == 4
    assert figures["keys"] == 3


def test_nearly_the_same_answers_are_one_pair_and_others_are_not():
    votes = [vote("p", LONG, "no"), vote("p", LONG + " now", "no", key="b"), vote("p", LONG[:30], "no", key="c")]
    found, _ = pairs(votes)
    assert [weight for *_, weight in found] == [2.0, 1.0]


def test_a_correction_of_one_word_keeps_its_direction():
    """Both of its answers are nearly the same; another vote for the corrected one is no contradiction."""
    better, worse = LONG.replace("lazy", "sleepy") + " " + LONG, LONG + " " + LONG
    found, figures = pairs([vote("p", better, worse, "a"), vote("p", better, worse, "b")])
    assert found == [("p", better, 2.0)]
    assert figures["contradicted"] == 0


def test_of_contradictions_the_difference_is_left():
    votes = [vote(key="a"), vote(key="b"), vote("p", "a bad one here", "a good answer", "c")]
    found, figures = pairs(votes)
    assert found == [("p", "a good answer", 1.0)]
    assert (figures["contradicted"], figures["undecided"]) == (1, 0)
    found, figures = pairs(votes[1:])
    assert found == []
    assert figures["undecided"] == 1


def test_a_key_that_changes_its_mind_counts_by_its_newest_vote():
    found, figures = pairs([vote(key="a"), vote("p", "a bad one here", "a good answer", "a", n=1)])
    assert found == [("p", "a bad one here", 1.0)]
    assert figures["contradicted"] == 0


def test_equal_answers_say_nothing_and_keys_can_be_left_out():
    found, figures = pairs([vote("p", "x y", " x y"), vote("q", key="bad"), vote("r")], leave_out=["bad"])
    assert [prompt for prompt, *_ in found] == ["r"]
    assert (figures["equal"], figures["left_out"]) == (1, 1)


@pytest.mark.parametrize(
    ("counts", "share", "others", "cap"),
    [
        ([20] * 19 + [2000], 0.1, 0, 380 / 9),  # c = .1 (380 + c)
        ([20] * 18 + [2000, 900], 0.1, 0, 45.0),  # c = .1 (360 + 2c)
        ([20] * 20, 0.1, 0, float("inf")),
        ([1000, 1, 1], 2 / 3, 0, 4.0),  # c = 2/3 (2 + c)
        ([1000], 0.5, 100, 100.0),  # beside what is the operator's own
        ([5, 1000], 1.0, 0, float("inf")),
        ([], 0.1, 0, float("inf")),
    ],
)
def test_what_a_key_may_count_for_is_worked_out_by_hand(counts, share, others, cap):
    assert cap_of(counts, share, others) == pytest.approx(cap)


def test_a_flood_counts_for_its_share_of_everything():
    """Twenty honest keys say ten things each, one says two thousand others: it ends with a tenth of the weight."""
    honest = [vote(f"question {k} {i}", key=f"h{k}", n=i) for k in range(20) for i in range(10)]
    flood = [vote(f"spam number {i}", "buy now", "an answer", "f", n=i) for i in range(2000)]
    found, figures = pairs([*honest, *flood])
    weight = {side: sum(w for p, _, w in found if p.startswith(side)) for side in ("question", "spam")}
    assert weight["question"] == 200
    assert weight["spam"] / sum(weight.values()) == pytest.approx(0.1, abs=1e-4)
    assert len(found) == 200 + 23  # as many of them as it counts for, not two thousand of next to no weight
    assert figures["capped"] == {"f": 1977}
    again, _ = pairs([*flood[::-1], *honest])
    assert {p for p, *_ in again} == {p for p, *_ in found}  # which ones does not depend on the order


def test_votes_without_a_key_are_the_operators_own():
    found, figures = pairs([vote(f"q{i}", key=None, n=i) for i in range(50)] + [vote("z", key="a"), vote("q0", key=None, n=99)])
    assert sum(weight for *_, weight in found) == 52
    assert figures["capped"] == {}
    heavy, _ = pairs([vote("q", key=None, weight=7.0), vote("r", key="a", weight=1000.0)], key_share=1.0)
    assert heavy == [("q", "a good answer", 7.0), ("r", "a good answer", 1.0)]  # a key's weight is no way around its share


def share_of_a_key(votes, key, **settings):
    """What a key's own prompts weigh, of everything."""
    found, _ = pairs(votes, **settings)
    theirs = {one.record.prompt for one in votes if one.key == key}
    return sum(w for p, _, w in found if p in theirs) / sum(w for *_, w in found)


@pytest.mark.parametrize("how", ["balance", "keep"])
def test_a_key_gets_around_its_share_neither_by_length_nor_by_what_others_quarrel_about(how):
    """Twenty keys like long answers, or contradict each other; one votes for short ones on prompts of its own."""
    honest = [vote(f"q{k} {i}", "long long long answer", "short", f"h{k}", i) for k in range(20) for i in range(9)]
    flood = [vote(f"spam {i}", "x", "a long answer here", "f", i) for i in range(500)]
    assert share_of_a_key([*honest, *flood], "f", length_bias=how) <= 0.1001
    quarrel = [
        vote(f"q {i}", *(("a good answer", "a bad one here")[:: 1 if k < 11 else -1]), f"h{k}", i)
        for k in range(20) for i in range(20)
    ]  # fmt: skip
    assert share_of_a_key([*quarrel, *flood], "f", length_bias=how) <= 0.1001


def test_one_newcomer_is_no_measure_of_the_others():
    """Where there are few keys none has more than twice an equal share, and a key of one vote takes nothing from the rest."""
    eight = [vote(f"q{k} {i}", key=f"h{k}", n=i) for k in range(8) for i in range(100)]
    found, figures = pairs([*eight, vote("new", key="n")])
    assert sum(w for *_, w in found) == 801
    assert figures["key_share"] == pytest.approx(2 / 9)
    assert pairs([vote(f"q{i}", key="a", n=i) for i in range(50)] + [vote("new", key="n")])[1]["capped"] == {}


def test_votes_for_long_answers_are_weighed_down_until_both_directions_weigh_alike():
    votes = [vote(f"q{i}", "long long long answer", "short", key=f"k{i}", n=i) for i in range(30)]
    votes += [vote(f"r{i}", "short", "long long long answer", key=f"k{i}", n=i) for i in range(6)]
    found, figures = pairs(votes)
    assert sum(w for p, _, w in found if p[0] == "q") == pytest.approx(sum(w for p, _, w in found if p[0] == "r"))
    assert figures["length"] == {"longer_wins": pytest.approx(5 / 6), "biased": True, "balanced": True}
    kept, figures = pairs(votes, length_bias="keep")
    assert {w for *_, w in kept} == {1.0}
    assert figures["length"]["biased"]
    assert not figures["length"]["balanced"]


def test_a_taste_for_short_answers_is_a_taste_and_a_few_long_ones_are_no_bias():
    short = [vote(f"r{i}", "short", "long long answer", key=f"k{i}", n=i) for i in range(30)]
    found, figures = pairs(short)
    assert {w for *_, w in found} == {1.0}
    assert not figures["length"]["biased"]
    few = [vote(f"r{i}", "long answer", "short", key=f"k{i}", n=i) for i in range(4)] + short[:1]
    assert not pairs(few)[1]["length"]["biased"]


def test_exact_intervals_are_clopper_and_pearsons():
    """Of 8 of 8 the lower end is tail^(1/8); of 3 of 10 tables say .067 and .652. Weights of 2 count as half as many votes."""
    low, high = binomial_interval(8, 8, level=0.95)
    assert low == pytest.approx(0.025 ** (1 / 8))
    assert high == 1
    assert binomial_interval(3, 10) == pytest.approx((0.0667, 0.6525), abs=1e-4)
    assert binomial_interval(0, 0) == (0, 1)
    assert sign_interval(8.0, 8.0, 8.0) == pytest.approx((low, high))
    assert sign_interval(16.0, 16.0, 32.0) == pytest.approx((low, high))
    assert sign_interval(0.0, 0.0, 0.0) == (0, 1)


# ---- reading


def test_votes_and_thumbs_are_read_as_the_server_writes_them(tmp_path):
    said = write_rows(
        tmp_path / "said.jsonl",
        [
            {"prompt": "p", "chosen": "a", "rejected": "b", "feedback": "vote", "key": "x", "time": "t1"},
            {"prompt": "p", "chosen": "a", "rejected": "b", "feedback": "vote", "key": "x", "time": "t1"},
            {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b", "weight": 2},
        ],
    )
    thumb = {"prompt": "t", "completion": "good", "label": True, "key": "y"}
    write_rows(
        tmp_path / "said.thumbs.jsonl",
        [thumb, thumb | {"completion": "bad", "label": False, "key": "z"}, thumb | {"completion": "more"},
         thumb | {"prompt": "lost", "label": False}],
    )  # fmt: skip
    found = read_said([str(said)])
    assert [(v.record.prompt, v.key, v.record.weight) for v in found.votes] == [
        ([{"role": "user", "content": "q"}], None, 2), ("t", "y", 1), ("p", "x", 1),
    ]  # fmt: skip
    assert (found.votes[1].record.chosen, found.votes[1].record.rejected) == ("good", "bad")
    assert found.lost == ["lost"]
    assert found.alone == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "a"}, "'label' that is true or false"),
        ({"prompt": "p", "label": True}, "a thumb has a 'completion'"),
        ({"completion": "a", "label": True}, "'prompt' is missing"),
        ({"prompt": "p", "completion": "a", "label": True, "key": ["x"]}, "'key' must be a text"),
    ],
)
def test_what_is_no_thumb_is_named(tmp_path, row, message):
    said = write_rows(tmp_path / "said.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    write_rows(tmp_path / "said.thumbs.jsonl", [row])
    with pytest.raises(DataError, match=rf"said\.thumbs\.jsonl:1: .*{message}"):
        read_said([str(said)])


def test_a_key_is_a_text(tmp_path):
    said = tmp_path / "said.jsonl"
    said.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "key": 3}) + "\n")
    with pytest.raises(DataError, match=r"said\.jsonl:1: 'key' must be a text"):
        read_said([str(said)])


def test_spelling_is_case_white_space_and_the_end():
    assert normal("  What's\n2+2?! ") == "what's 2+2"
    assert normal("Really?") == normal("really")
    apart = ["What is 2+3?", "What is 2*3?", "return x - 1;", "return x + 1;", "\u0915\u0940", "\u0915\u093e", "???", "!"]
    assert len({normal(text) for text in apart}) == len(apart)


def test_a_correction_of_a_mark_is_a_vote():
    found, figures = pairs([vote("p", "return x - 1;", "return x + 1;"), vote("q", "Yes.", "yes")])
    assert len(found) == 2
    assert figures["equal"] == 0


def test_answers_of_one_word_over_and_over_have_a_direction():
    """Their words in threes are one set, so only their texts tell who prefers what."""
    longer, shorter = " ".join(["ha"] * 6), " ".join(["ha"] * 4)
    _, figures = pairs([vote("p", longer, shorter, "a"), vote("p", shorter, longer, "b")])
    assert (figures["undecided"], figures["pairs"]) == (1, 0)


def test_the_newest_vote_is_so_by_its_time_and_rows_without_one_all_count(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "key": "x", "time": "2026-02-01T00:00:00+00:00"}
    old = {**row, "chosen": "b", "rejected": "a", "time": "2026-01-01T00:00:00+00:00"}
    files = [write_rows(tmp_path / "new.jsonl", [row]), write_rows(tmp_path / "old.jsonl", [old])]
    assert [v.record.chosen for v in read_said(list(map(str, files))).votes] == ["b", "a"]
    own = write_rows(tmp_path / "own.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3)
    assert len({v.digest for v in read_said([str(own)]).votes}) == 3
    assert pairs(read_said([str(own)]).votes)[0] == [("p", "a", 3.0)]


def test_what_counts_as_new():
    """Votes on equal answers, said again, or of a key that is left out, are none; a flood is its share."""
    honest = [vote(f"q{k}", key=f"h{k}") for k in range(20)]
    noise = [vote(f"e{i}", "same", "same", "f", i) for i in range(50)]
    flood = [vote(f"spam {i}", key="f", n=i) for i in range(500)]
    again = [vote(f"Q{k}?", key=f"h{k}", n=1) for k in range(20)]
    turned = [vote("q3", "a bad one here", "a good answer", "h3", 2)]
    how = {"key_share": 0.1, "leave_out": ()}
    had = {one.digest for one in honest}
    assert len(told_apart([*honest, *noise, *again], (), **how)) == 20
    assert told_apart([*honest, *noise, *again], had, **how) == []
    assert told_apart([*honest, *again, *turned], had, **how) == turned  # who changes their mind says something
    assert len(told_apart([*honest, *flood], (), **how)) == 20 + 3  # 20 / 9, rounded up
    assert told_apart(flood, (), key_share=0.1, leave_out=("f",)) == []


def test_where_others_quarrel_to_a_draw_what_is_left_still_counts():
    """Of twelve keys ten contradict each other in every pair; the two that do not share what weight there is."""
    votes = [
        vote(f"q{i}", *(("a good answer", "a bad one here")[:: 1 if k < 5 else -1]), f"h{k}", i)
        for k in range(10)
        for i in range(6)
    ]
    votes += [vote(f"own {k} {i}", key=f"o{k}", n=i) for k in range(2) for i in range(4)]
    found, figures = pairs(votes)
    assert len(found) == 8
    assert {w for *_, w in found} == {1.0}
    assert figures["undecided"] == 6
    assert figures["weighed_down"] == {}


def test_two_thousand_answers_to_one_prompt_are_compared_in_seconds():
    draw = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    many = [vote("p", " ".join(draw.choices(words, k=40)), "no", f"k{i % 50}", i) for i in range(2000)]
    began = time.process_time()
    assert len(sift(many).records) == 2000
    assert time.process_time() - began < 20
