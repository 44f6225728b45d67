"""Text statistics by hand, and on what is empty, short or not English."""

import json

import pytest

from trimtab.evaluate.texts import describe_texts, distinct_at_equal_length
from trimtab.words import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world!", ["Hello", ",", "world", "!"]),
        ("naïve café_1 — 3.5", ["naïve", "café_1", "—", "3", ".", "5"]),
        ("你好，世界 🚀🙂", ["你好", "，", "世界", "🚀", "🙂"]),
        (" \n\t\u00a0", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_or_single_other_characters(text, words):
    assert split_words(text) == words


def test_statistics_by_hand():
    """Words: "a b a b a b" has 6, "c c" has 2, "" none. Unigrams a b c of 8; bigrams ab ba cc of 5 + 1; trigrams aba bab of 4.

    4-grams: abab baba abab, so 1 − 2/3 of the first answer repeats, and the others are too short to count.
    """
    got = describe_texts(["a b a b a b", "c c", ""], ["stop", "length", None])
    assert got == {
        "answers": 3,
        "empty": pytest.approx(1 / 3),
        "mean_characters": pytest.approx((11 + 3) / 3),
        "mean_words": pytest.approx(8 / 3),
        "distinct_1": pytest.approx(3 / 8),
        "distinct_2": pytest.approx(3 / 6),
        "distinct_3": pytest.approx(2 / 4),
        "repetition_4": pytest.approx(1 / 3),
        "truncated": pytest.approx(1 / 2),
    }
    json.dumps(got, allow_nan=False)


def test_repetition_is_the_mean_over_answers_and_not_over_the_corpus():
    """The same answer twice repeats nothing in itself: 0 and 0. One word 8 times has one 4-gram 5 times: 1 − 1/5."""
    assert describe_texts(["a b c d e"] * 2)["repetition_4"] == 0.0
    assert describe_texts(["a b c d e", "a " * 8])["repetition_4"] == pytest.approx(0.8 / 2)


def test_n_grams_stay_within_an_answer():
    """Two answers of one word have no bigram; as one text they would."""
    assert describe_texts(["a", "b"])["distinct_2"] is None


@pytest.mark.parametrize("answers", [[], [""], ["", " \n"]])
def test_nothing_is_none_and_not_an_error(answers):
    got = describe_texts(answers)
    json.dumps(got, allow_nan=False)
    assert got["answers"] == len(answers)
    assert got["empty"] == (1.0 if answers else None)
    assert got["distinct_1"] is got["repetition_4"] is got["truncated"] is None


def test_finish_reasons_must_be_as_many():
    with pytest.raises(ValueError, match="2 answers, but 1 finish"):
        describe_texts(["a", "b"], ["stop"])


def test_distinct_at_equal_length_forgives_nobody_for_brevity():
    """Both systems say the same, but the second leaves a prompt out, so its plain distinct_1 is higher. Cut alike, they agree.

    Plain: 4 words of 8 against 4 of 4. Cut to 4 + 0 words, the first has a b c d as well: 1 and 1, and bigrams 3 of 3.
    """
    long, short = ["a b c d", "a b c d"], ["a b c d", ""]
    assert describe_texts(long)["distinct_1"] == 0.5 < describe_texts(short)["distinct_1"] == 1.0
    got = distinct_at_equal_length({"long": long, "short": short})
    assert got["long"] == got["short"] == {"distinct_1": 1.0, "distinct_2": 1.0, "distinct_3": 1.0}


def test_distinct_at_equal_length_still_tells_the_systems_apart():
    got = distinct_at_equal_length({"dull": ["x x x x", "x x"], "lively": ["a b c", "d e f g"]})
    assert got["dull"] == {"distinct_1": 1 / 5, "distinct_2": 1 / 3, "distinct_3": 1.0}
    assert got["lively"] == {"distinct_1": 1.0, "distinct_2": 1.0, "distinct_3": 1.0}
    assert distinct_at_equal_length({}) == {}


def test_systems_must_answer_the_same_prompts():
    with pytest.raises(ValueError, match="from 1 to 2 answers"):
        distinct_at_equal_length({"one": ["a"], "two": ["a", "b"]})
