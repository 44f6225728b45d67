"""ROUGE and chrF against values worked out by hand."""

import subprocess
import sys

import pytest

from trimtab.errors import DataError, InvalidOption
from trimtab.judges.references import METRICS, ReferenceMetric, preference, unicode_words


def one(name: str, answer: str, reference: str | list[str], **settings: str) -> float:
    return ReferenceMetric(name, **settings).score([answer], [reference])[0]


def test_rouge_counts_words_in_common():
    """Answer "the cat sat" (3 words), reference "the cat lay down" (4 words).

    rouge1: {the, cat} in common: P = 2/3, R = 2/4, F = 2PR / (P + R) = (2/3) / (7/6) = 4/7.
    rouge2: "the cat" of 2 and of 3 bigrams: P = 1/2, R = 1/3, F = (1/3) / (5/6) = 2/5.
    rougeL: the longest common subsequence is "the cat": as rouge1.
    """
    pair = "the cat sat", "the cat lay down"
    assert one("rouge1", *pair) == pytest.approx(4 / 7)
    assert one("rouge2", *pair) == pytest.approx(2 / 5)
    assert one("rougeL", *pair) == pytest.approx(4 / 7)
    assert one("rougeLsum", *pair) == pytest.approx(4 / 7)


def test_rouge_l_minds_the_order_and_its_sum_the_lines():
    """Answer "c d / a b", reference "a b / c d", lines apart.

    rouge1: all four words: 1. rougeL: one subsequence over all, "a b" or "c d": 2 of 4 words, F = 1/2.
    rougeLsum: for each line of the reference the union over the answer's lines: 2 + 2 of 4, F = 1.
    """
    pair = "c d\na b", "a b\nc d"
    assert one("rouge1", *pair) == 1
    assert one("rougeL", *pair) == pytest.approx(1 / 2)
    assert one("rougeLsum", *pair) == 1


def test_rouge_stems_and_ignores_case_and_punctuation():
    """Porter: "jumping" and "jumps" are "jump", "cats" is "cat"."""
    assert one("rouge1", "Jumping, CATS!", "jumps cat") == 1


def test_chrf_of_three_letters():
    """Answer "abc", reference "abd"; orders above 3 have no n-grams and do not count.

    1-grams: 2 of 3; 2-grams: "ab", 1 of 2; 3-grams: 0 of 1. Precision = recall = (2/3 + 1/2 + 0) / 3 = 7/18, and so is F₂.
    """
    assert one("chrf", "abc", "abd") == pytest.approx(7 / 18)


def test_chrf_weighs_recall_four_times():
    """Answer "ab", reference "abab": 1-grams P = 2/2, R = 2/4; 2-grams ("ab" of {ab: 2, ba: 1}) P = 1, R = 1/3.

    Mean P = 1, mean R = 5/12; F₂ = 5PR / (4P + R) = (25/12) / (53/12) = 25/53.
    """
    assert one("chrf", "ab", "abab") == pytest.approx(25 / 53)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_one_for_the_same_and_nothing_for_something_else(name):
    metric = ReferenceMetric(name)
    assert metric.score(["one two three four"] * 3, ["one two three four", "xxyy zzxx", "one two"])[:2] == pytest.approx([1, 0])
    assert metric.score(["", "  ", "?!"], ["one two"] * 3) == [0, 0, 0]
    assert metric.score([], []) == []


@pytest.mark.parametrize("name", METRICS)
def test_the_best_of_several_references_counts_in_any_order(name):
    answer, near, far = "the cat sat on a mat", "the cat sat on the mat", "dogs bark"
    best = one(name, answer, near)
    assert 0 < best < 1
    assert one(name, answer, [near, far]) == one(name, answer, [far, near]) == best


def test_scores_come_in_the_order_of_the_answers():
    assert ReferenceMetric("rouge1").score(["a b", "c", "a"], ["a b", "a b", ("x", "a b")]) == pytest.approx([1, 0, 2 / 3])


# ---- other scripts


@pytest.mark.parametrize("name", [name for name in METRICS if name != "chrf"])
@pytest.mark.parametrize(
    "text", ["Я люблю кошек", "我喜欢猫", "나는 고양이를 좋아한다", "मुझे बिल्ली पसंद है", "GPT 是一种语言模型"]
)
def test_rouge_refuses_what_its_published_tokenizer_would_drop(name, text):
    with pytest.raises(InvalidOption, match=r"references\[1\] is not in the Latin alphabet.*'unicode', or chrf"):
        ReferenceMetric(name).score(["a", "b"], ["a", ["a", text]])
    assert one(name, text, text, tokenizer="unicode") == 1
    assert one("chrf", text, text) == pytest.approx(1)


@pytest.mark.parametrize(
    "text", ["Beyoncé's naïve café", "Größe zählt für Łódź", "tiếng Việt", "“so” — 42 €", "日本 is Japan in Japanese"]
)
def test_latin_letters_with_accents_are_scored_as_published(text):
    assert one("rouge1", text, text) == 1


def test_an_answer_in_another_script_than_its_reference_scores_nothing():
    assert one("rouge1", "我喜欢猫", "I like cats") == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 9 o'clock_now, OK?", ["it", "s", "9", "o", "clock", "now", "ok"]),
        ("Я люблю кошек!", ["я", "люблю", "кошек"]),
        ("我喜欢GPT4。", ["我", "喜", "欢", "gpt4"]),
        ("2024年の猫", ["2024", "年", "の", "猫"]),
        ("나는 고양이를", ["나는", "고양이를"]),
        ("मुझे पसंद है", ["मुझे", "पसंद", "है"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("cafe\u0301 café", ["café", "café"]),
        ("Ａｂｃ", ["abc"]),
        ("\u0301 \n", []),
    ],
)
def test_words_of_every_script(text, words):
    assert unicode_words(text) == words


def test_chinese_rouge_by_hand():
    """ "我喜欢猫" and "我爱猫": 我 and 猫 in common; P = 2/4, R = 2/3, F = (2/3) / (7/6) = 4/7."""
    assert one("rouge1", "我喜欢猫", "我爱猫", tokenizer="unicode") == pytest.approx(4 / 7)
    assert one("rougeL", "我喜欢猫", "我爱猫", tokenizer="unicode") == pytest.approx(4 / 7)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "chrf"])
def test_on_ascii_both_tokenizers_are_one(name):
    answers = ["The runners' snake_case id_42 was running, quickly!", "don't\nworry 3.14", "a-b c/d", ""]
    references = ["A runner ran quick: snake case, id 42.", "do not\nworrying about 3 14", "a b\tc d", "x"]
    plain = ReferenceMetric(name).score(answers, references)
    assert ReferenceMetric(name, tokenizer="unicode").score(answers, references) == plain
    assert any(0 < value < 1 for value in plain)


# ---- what is refused


def test_unknown_names_are_refused():
    with pytest.raises(InvalidOption, match="there is no metric 'bleu'; there are rouge1, rouge2, rougeL, rougeLsum, chrf"):
        ReferenceMetric("bleu")
    with pytest.raises(InvalidOption, match="there is no tokenizer 'moses'; there are ascii, unicode"):
        ReferenceMetric("rouge1", tokenizer="moses")
    with pytest.raises(InvalidOption, match="chrf compares characters: it takes no tokenizer"):
        ReferenceMetric("chrf", tokenizer="unicode")


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [
        ("text", ["text"], "must be lists"),
        (["a", "b"], ["a"], "there are 2 answers, but 1 references"),
        ([None], ["a"], r"answers\[0\] must be a text, not None"),
        (["a"], [None], r"references\[0\] must be a text or a list of texts, not None"),
        (["a"], [[]], r"references\[0\] must be a text or a list of texts, not \[\]"),
        (["a"], [["a", 1]], r"references\[0\] must be a text or a list of texts"),
        (["a", "a"], ["a", ["a", " "]], r"references\[1\] is empty"),
    ],
)
def test_malformed_pairs_are_named(answers, references, message):
    with pytest.raises(DataError, match=message):
        ReferenceMetric("rouge1").score(answers, references)


@pytest.mark.parametrize(("name", "library"), [("rougeL", "rouge_score"), ("chrf", "sacrebleu")])
def test_a_missing_library_is_named_with_its_remedy(name, library, monkeypatch):
    for module in [key for key in sys.modules if key.partition(".")[0] == library] or [library]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InvalidOption, match=rf"the metric '{name}' needs the extra 'eval' .*pip install 'trimtab\[eval\]'"):
        ReferenceMetric(name)


def test_importing_the_module_does_not_need_them():
    code = "import sys; import trimtab.judges.references; print({'rouge_score', 'sacrebleu', 'nltk'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_preferences_compare():
    assert (preference(0.2, 0.3), preference(0.3, 0.2), preference(0.3, 0.3)) == (2.0, 1.0, 1.5)
