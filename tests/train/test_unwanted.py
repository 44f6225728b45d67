"""Unpaired preference: an answer that is not wanted is never read as one that is."""

import pytest

from eval_task import called
from tiny_task import make_task, write_rows
from trimtab.cli.common import DataOptions
from trimtab.errors import DataError
from trimtab.train.records import read_records

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


@pytest.mark.parametrize(
    "labels", [(True, True), (1, 1), (None, None), (0, 1, 2), (0.0, 0.3), ("sports", "no"), ("1",), ([0], [1])]
)
def test_wanted_answers_and_classes_are_read(labels, tmp_path):
    assert [record.chosen for record in read_records(data(tmp_path, labels))] == ["hello"] * len(labels)


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
