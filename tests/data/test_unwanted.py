"""Unpaired preference: an answer that is not wanted is never read as one that is."""

import re

import pytest

from eval_task import called
from tiny_task import make_task, write_rows
from trimtab.data.options import DataOptions
from trimtab.data.records import read_records
from trimtab.errors import DataError

CHAT = {
    "prompt": [{"role": "user", "content": "hi"}],
    "completion": [{"role": "assistant", "content": "hello"}],
}
TEXT = {"prompt": "hi", "completion": "hello"}
TALK = {"messages": CHAT["prompt"] + CHAT["completion"]}
SAID = "--columns prompt=prompt --columns completion=completion"


def data(folder, labels, row=TEXT):
    return str(write_rows(folder / "data.jsonl", [row | {"label": label} for label in labels]))


@pytest.mark.parametrize("row", [TEXT, CHAT, TALK, {"prompt": "hi", "chosen": "hello"}])
@pytest.mark.parametrize(
    "labels", [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), (0, 0), (1, -1), (None, False), ("good", " bad ")]
)
def test_an_unwanted_answer_is_refused_with_its_place_and_the_cure(labels, row, tmp_path):
    path = data(tmp_path, labels, row)
    with pytest.raises(DataError, match="'label' says that the answer is not wanted") as caught:
        read_records(path)
    first = next(i for i, label in enumerate(labels, 1) if label not in (None, True, 1, "true", "good"))
    assert str(caught.value).startswith(f"{path}:{first}: ")
    assert "keep the records with label=true, or pair the answers" in str(caught.value)
    assert SAID in str(caught.value)


def test_false_says_it_among_any_others(tmp_path):
    with pytest.raises(DataError, match="as it does of 1 of 3 answers"):
        read_records(data(tmp_path, [True, "maybe", False]))


SPELLINGS = [
    *(("1.0", "0.0"), ("+1", "-1"), ("positive", "negative"), ("pos", "neg"), ("y", "n"), ("t", "f"), ("like", "dislike")),
    *(("up", "down"), ("thumbs_up", "thumbs_down"), ("Thumbs Up", "Thumbs-Down"), ("accepted", "rejected"), ("safe", "unsafe")),
    *(("preferred", "dispreferred"), ("desired", "undesired"), ("wanted", "unwanted"), ("win", "lose"), (1, "Bad.")),
    *((["desired"], ["undesired"]), ([True], [False]), ([[1]], [[0]]), ("correct", "incorrect"), ("good", "not good")),
    *(
        ("helpful", "unhelpful"),
        ("👍", "👎"),
        ("+", "-"),
        ("✓", "✗"),
        ("upvote", "downvote"),
        ("sports", "no"),
        ("unsure", "bad"),
    ),
]


@pytest.mark.parametrize("stray", [(), ("",), (" ",), (None,), (float("nan"),), ("N/A",), ([""],)], ids=repr)
@pytest.mark.parametrize("labels", SPELLINGS, ids=repr)
def test_every_spelling_of_no_is_heeded_whatever_blanks_stand_beside(labels, stray, tmp_path):
    path = data(tmp_path, labels + stray)
    with pytest.raises(DataError, match=f"^{path}:2: 'label' says that the answer is not wanted, as it does of 1 of"):
        read_records(path)


@pytest.mark.parametrize("stray", ["unsure", "maybe", "skipped"])
@pytest.mark.parametrize("labels", [("good", "bad"), ("accepted", "rejected"), (1, 0), ("like", "dislike"), (1, "bad")])
def test_a_stray_word_makes_no_classes_of_yes_and_no(labels, stray, tmp_path):
    with pytest.raises(DataError, match="'label' says that the answer is not wanted"):
        read_records(data(tmp_path, (*labels, stray)))


@pytest.mark.parametrize("labels", [("undesired",), (["undesired"],), ("0.0", "0"), ("rejected", None), (0, "sports")])
def test_a_no_needs_no_yes_beside_it(labels, tmp_path):
    with pytest.raises(DataError, match="'label' says that the answer is not wanted"):
        read_records(data(tmp_path, labels))


@pytest.mark.parametrize(
    "labels", [(True, True), (1, 1), (None, None), ("1",), ("1.0", "+1", True, "Yes!"), ("", " ", None), ("good", "accepted")]
)
def test_wanted_answers_are_read_without_a_word(labels, tmp_path, caplog):
    assert [record.chosen for record in read_records(data(tmp_path, labels))] == ["hello"] * len(labels)
    assert not caplog.records


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ((0, 1, 2), "0.0, 1.0, 2.0"),
        ((0.0, 0.3), "0.0, 0.3"),
        (("5", "1", "-1"), "-1.0, 1.0, 5.0"),
        (("sports", "politics"), "politics, sports"),
        (("en", "no", "de"), "de, en, no"),
        (("positive", "Negative", "neutral"), "negative, neutral, positive"),
        (([0, 1], [1, 0]), r"\[0,1\], \[1,0\]"),
    ],
)
def test_classes_are_read_and_the_warning_says_that_their_label_is_not(labels, shown, tmp_path, caplog):
    path = data(tmp_path, labels)
    assert [record.chosen for record in read_records(path)] == ["hello"] * len(labels)
    assert len(caplog.records) == 1
    assert re.fullmatch(rf"{path}:\d: 'label' \({shown}\) is not read: each answer counts as wanted", caplog.messages[0])


def test_a_label_that_named_columns_leave_out_is_warned_of(tmp_path, caplog):
    how = DataOptions(columns=("prompt=prompt", "completion=completion"))
    path = data(tmp_path, [True, False])
    assert [record.chosen for record in read_records(path, how=how)] == ["hello", "hello"]
    assert caplog.messages == [f"{path}:2: 'label' (False, True) is not read: each answer counts as wanted"]
    caplog.clear()
    read_records(data(tmp_path, [True, True]), how=how)
    read_records(data(tmp_path, ["bad", "good"]), how=DataOptions(columns=("prompt=prompt", "completion=label")))
    assert not caplog.records


def test_pairs_prompts_and_columns_that_are_named_do_not_go_by_it(tmp_path):
    path = data(tmp_path, [False, True], TEXT | {"rejected": "what"})
    assert read_records(path)[0].chosen == "hello"
    path = data(tmp_path, [False, True])
    assert read_records(path, how=DataOptions(columns=("prompt=prompt", "completion=completion")))[0].chosen == "hello"
    assert [record.chosen for record in read_records(path, need="prompt", answers=False)] == [None, None]
    assert read_records(data(tmp_path, [False], {"prompt": "hi"}), need="prompt")[0].chosen is None


def test_commands_that_take_answers_for_wanted_refuse_and_others_do_not(tmp_path, capsys):
    """`propose` writes an answer as `chosen`, and `eval` takes it for a reference; `generate` asks for prompts alone."""
    folder = make_task(tmp_path)
    rows = [{"prompt": "def", "completion": "xyz", "label": True}, {"prompt": "gh", "completion": "abc", "label": False}]
    path = write_rows(folder / "unpaired.jsonl", rows)
    models = ["--proposal", folder / "proposal", "--aligner", folder / "start"]
    out = folder / "out.jsonl"
    for words in (
        ["train", *models, "--dataset", path, "--output_dir", folder / "out"],
        ["train", *models, "--dataset", folder / "train.jsonl", "--eval_dataset", path, "--output_dir", folder / "out"],
        ["train", "--dry_run", *models, "--dataset", path, "--output_dir", folder / "out", "--use_cpu"],
        ["score", *models, "--dataset", path],
        ["eval", *models, "--dataset", path, "--judge", "chrf", "--out", out],
        ["propose", *models, "--dataset", path, "--out", out],
        ["propose", "--dry_run", *models, "--dataset", path, "--out", out],
    ):
        status, _, errors = called(capsys, *words)
        assert (status, f"{path}:2: 'label' says that the answer is not wanted" in errors[0]) == (1, True), words
    assert not out.exists()
    assert not (folder / "out" / "run.json").exists()
    assert called(capsys, "generate", *models, "--input", path, "--out", out, "--max_tokens", 2)[0] == 0
    assert called(capsys, "propose", *models, "--dataset", path, "--columns", "prompt=prompt", "--out", out)[0] == 0
