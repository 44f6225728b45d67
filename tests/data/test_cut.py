"""Answers that were cut: found where they pile up or stop behind whole sentences, left alone where data are only plain."""

import json
import logging
from pathlib import Path

import pytest

from tiny import bpe_tokenizer, tiny_tokenizer
from tiny_task import make_task, task_options, task_plan, task_rows, write_rows
from trimtab.data.cut import find_cut, looks_cut, mark_cut
from trimtab.data.encoding import Encoder
from trimtab.data.records import Record
from trimtab.errors import InvalidOption
from trimtab.train.inputs import encode_parts, read_parts
from trimtab.train.run import run_training as train

TEXT = "return the list of all open files and close each one that nobody else needs before we go on with other work"
WORDS = TEXT.split()


def sentence(i: int) -> str:
    """From 6 to 21 words, with a full stop."""
    start = i % 7
    return " ".join((WORDS * 2)[start : start + 6 + 5 * i % 16]).capitalize() + "."


def count_words(texts):
    """As a tokenizer would that has a token for each word."""
    return [len(text.split()) for text in texts]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Return the list of", True),
        ("Return the list of all files,", True),
        ("Return the list of all files and (", True),
        ("返回所有打开的文件和", True),
        ("सभी खुली फ़ाइलें और उनके", True),
        ("Return the list of all files.", False),
        ("Is it open? ", False),
        ("He said “Return the list.”", False),
        ("*Return the list!*", False),
        ("返回所有打开的文件。", False),
        ("सभी खुली फ़ाइलें।", False),
        ("คืนรายการไฟล์ทั้งหมด", False),  # Thai has no mark for the end
        ('{"open": [1, 2]}', False),
        ("```\nreturn files\n```", False),
        ("print(files)", False),
        ("It is 42", False),
        ("Well done 🎉", False),
        ("positive", False),
        ("", False),
    ],
)
def test_a_text_looks_cut_where_no_sentence_stops(text, cut):
    assert looks_cut(text) == cut


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        (lambda text: " ".join(text.split()[:10]), "exactly 10 words"),
        (lambda text: text[:48].rstrip(), "exactly 48 characters"),
    ],
)
def test_answers_that_were_cut_at_a_length_are_found(cut, why):
    whole = [sentence(i) for i in range(200)]
    texts = [cut(text) for text in whole]
    found = find_cut(texts, count_words)
    assert why in found.why
    shortened = {i for i in range(200) if looks_cut(texts[i])}
    assert set(found.places) <= shortened
    assert len(found.places) > 0.75 * len(shortened)


def test_answers_that_were_cut_at_a_number_of_tokens_are_found():
    whole = [sentence(i) for i in range(200)]
    tokenizer = bpe_tokenizer(whole, merges=40)
    texts = [tokenizer.decode(tokenizer(text)["input_ids"][:24]) for text in whole]
    found = find_cut(texts, lambda some: [len(tokenizer(text)["input_ids"]) for text in some])
    assert "exactly 24 tokens" in found.why
    shortened = {i for i in range(200) if texts[i] != whole[i] and looks_cut(texts[i])}
    assert set(found.places) <= shortened
    assert len(found.places) > 0.9 * len(shortened)


def test_answers_that_stop_behind_whole_sentences_are_found_at_any_length():
    texts = [f"{sentence(i)} {sentence(i + 1)}" for i in range(60)]
    texts[::3] = [f"{sentence(i)} {' '.join(WORDS[: 2 + i])}" for i in range(20)]
    found = find_cut(texts, count_words)
    assert found.places == list(range(0, 60, 3))
    assert found.why == "20 stop at a letter behind whole sentences"
    assert len(find_cut(texts[::3], count_words).places) == 20  # though none of them is whole


@pytest.mark.parametrize(
    "texts",
    [
        [sentence(i) for i in range(200)],
        [sentence(i).rstrip(".") for i in range(200)],  # titles: none has a mark, and their lengths differ
        ["positive", "negative"] * 100,
        ["very positive", "very negative"] * 100,
        [f"{i:064x}" for i in range(1000, 1200)],
        [f'{{"open": {i}, "closed": {i + 1}}}' for i in range(100, 300)],
        [f"def f{i}(x):\n    # It adds. And returns.\n    return x + offset_{'a' * (1 + i % 9)}" for i in range(200)],
        [f"Things to buy:\n- apples and {'very ' * (i % 12)}ripe pears\n- bread of the day before" for i in range(200)],
        [f"{sentence(i)} {sentence(i + 1)}" for i in range(180)] + [f"{sentence(i)} And {'then ' * i}on" for i in range(20)],
        [f"The capital of {place} is {place.lower()}ville" for place in WORDS * 9],  # one pattern
        ["Return the list of", "Close the file and"] * 3,  # too few to tell
    ],
)
def test_whole_answers_are_left_alone(texts):
    assert find_cut(texts, count_words) is None


def records(texts):
    return [Record(f"prompt {i}", text, None, f"here:{i}") for i, text in enumerate(texts)]


def test_cut_answers_are_marked_in_every_part_and_warned_of_once(caplog):
    texts = [" ".join(sentence(i).split()[:10]) for i in range(100)]
    parts = [records(texts[:80]), records(texts[80:])]
    with caplog.at_level(logging.INFO, "trimtab"):
        auto = mark_cut(parts, "auto", tiny_tokenizer())
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        marked = [bool(record.unfinished) for part in auto for record in part]
        assert marked == [looks_cut(text) for text in texts]
        said = caplog.records[0].getMessage()
        assert f"of 100 chosen answers, {sum(marked)} ({sum(marked)} %) look cut" in said
        assert "--cut_answers end" in said
        assert said.count("'…") == 2
        caplog.clear()
        assert mark_cut(parts, "end", tiny_tokenizer()) == parts
        titles = [records(text.rstrip(".") for text in map(sentence, range(20)))]
        assert mark_cut(titles, "auto", tiny_tokenizer()) == titles
        assert not caplog.records
        assert all(record.unfinished == {"chosen"} for record in mark_cut(titles, "continue", tiny_tokenizer())[0])


def test_what_the_data_call_unfinished_is_not_judged_again(caplog):
    texts = [" ".join(sentence(i).split()[:10]) for i in range(100)]
    known = [Record("p", text, None, "here", frozenset({"chosen"} if looks_cut(text) else ())) for text in texts]
    with caplog.at_level(logging.WARNING, "trimtab"):
        assert mark_cut([known], "auto", tiny_tokenizer()) == [known]
    assert not caplog.records


def test_unwanted_answers_and_chats_are_judged_too():
    texts = [" ".join(sentence(i).split()[:10]) for i in range(40)]
    chats = [Record([{"role": "user", "content": "go"}], [{"role": "assistant", "content": "Done."}],
                    [{"role": "assistant", "content": text}], "here") for text in texts]  # fmt: skip
    ((*marked,),) = mark_cut([chats], "auto", tiny_tokenizer())
    assert [record.unfinished for record in marked] == [frozenset({"rejected"} if looks_cut(t) else ()) for t in texts]


def test_a_cut_answer_teaches_no_end_of_sequence(tmp_path, caplog):
    """The same in training and development, with the warning; `--cut_answers end` lets every answer end."""
    folder = make_task(tmp_path)
    rows = [row | {"chosen": " ".join(sentence(i).lower().rstrip(".").split()[:8])} for i, row in enumerate(task_rows(60))]
    rows = [row | {"chosen": "ab"} if i % 3 == 0 else row for i, row in enumerate(rows)]
    write_rows(folder / "train.jsonl", [{key: row[key] for key in ("prompt", "chosen")} for row in rows])
    encoder = Encoder(tiny_tokenizer(), 28, (0,))
    plan = task_plan(folder, "out", {"max_steps": 2}, max_length=200)
    with caplog.at_level(logging.WARNING, "trimtab"):
        parts = encode_parts(read_parts(plan, encoder.tokenizer), plan, encoder, 200, 200)
    assert sum("look cut" in record.message for record in caplog.records) == 1
    for part in parts:
        long = [example for example in part if len(example.chosen) > 8]
        assert long
        eight = [example for example in long if bytes(example.chosen).count(27) == 7]
        assert eight
        assert all(example.chosen[-1] != 0 for example in eight)
        assert all(example.chosen[-1] == 0 for example in part if example not in eight)
    ended = task_plan(folder, "ended", {"max_steps": 2}, max_length=200, cut_answers="end")
    parts = encode_parts(read_parts(ended, encoder.tokenizer), ended, encoder, 200, 200)
    assert all(example.chosen[-1] == 0 for part in parts for example in part)
    assert train(task_options(folder, "run", {"max_steps": 1}, dev_fraction=0.1))["tokens"] > 0
    assert json.loads((folder / "run" / "run.json").read_text())["cut_answers"] == "auto"


def test_another_way_is_refused():
    with pytest.raises(InvalidOption, match="cut_answers must be one of auto, end, continue, not 'drop'"):
        task_options(Path("here"), "out", cut_answers="drop")
