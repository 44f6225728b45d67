"""Data whose columns are called otherwise or hide the prompt in the answers, and parts of hub data sets."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tiny_task import write_rows
from trimtab.data.implicit import implicit_prompt
from trimtab.data.options import DataOptions
from trimtab.data.prompts import chat_columns
from trimtab.data.records import read_records
from trimtab.data.sources import is_cached
from trimtab.errors import DataError, InvalidOption

USER, HELLO, RUDE = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "hello"), ("assistant", "what"))
)
TALK = "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"


def read(tmp_path, row, *columns, need="chosen"):
    """A record of one row, as a triple."""
    path = write_rows(tmp_path / "data.jsonl", [row])
    record = read_records(str(path), need=need, how=DataOptions(columns=columns))[0]
    return record.prompt, record.chosen, record.rejected


def test_a_field_is_read_from_the_column_that_is_named(tmp_path):
    row = {"post": "hi", "summary": "hello", "worse": "what", "prompt": "no"}
    assert read(tmp_path, row, "prompt=post", "completion=summary") == ("hi", "hello", None)
    assert read(tmp_path, row, "prompt=post", "chosen=summary", "rejected=worse", need="rejected") == ("hi", "hello", "what")


def test_columns_that_are_not_named_are_not_looked_at(tmp_path):
    """UltraChat has a prompt beside its messages, which would be taken for the first of them."""
    row = {"prompt": "hi", "messages": [USER, HELLO]}
    with pytest.raises(DataError, match="has neither 'completion' nor 'chosen'"):
        read(tmp_path, row)
    assert read(tmp_path, row, "messages=messages") == ([USER], [HELLO], None)


def test_a_column_that_is_not_there_is_named_with_its_place(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:1: there is no column 'post', which --columns names; it has: prompt"):
        read(tmp_path, {"prompt": "hi"}, "prompt=post")
    with pytest.raises(InvalidOption, match="columns must be FIELD=COLUMN"):
        read(tmp_path, {"prompt": "hi"}, "text=post")


LOOK = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize("tools", [[LOOK], json.dumps([LOOK])], ids=["list", "text"])
def test_tools_and_settings_of_the_template_belong_to_the_prompt(tmp_path, tools):
    row = {"messages": [USER, HELLO], "tools": tools, "chat_template_kwargs": {"thinking": True}}
    prompt = {"messages": [USER], "tools": [LOOK], "chat_template_kwargs": {"thinking": True}}
    assert read(tmp_path, row) == (prompt, [HELLO], None)
    assert chat_columns(prompt) == {"prompt": [USER], "tools": [LOOK], "chat_template_kwargs": {"thinking": True}}
    assert read(tmp_path, {**chat_columns(prompt), "completion": [HELLO]}) == (prompt, [HELLO], None)
    assert read(tmp_path, {"chat": [USER, HELLO], "can": tools}, "messages=chat", "tools=can")[0] == {
        "messages": [USER],
        "tools": [LOOK],
    }


@pytest.mark.parametrize("nothing", [None, [], ""], ids=repr)
def test_no_tools_are_none(tmp_path, nothing):
    assert read(tmp_path, {"messages": [USER, HELLO], "tools": nothing}) == ([USER], [HELLO], None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi", "completion": "hello", "tools": [LOOK]}, "'tools' goes to a chat template, but 'prompt' is a text"),
        ({"messages": [USER, HELLO], "tools": "[{"}, "'tools' is not JSON"),
        ({"messages": [USER, HELLO], "tools": LOOK}, "'tools' must be a list of JSON schemas"),
        ({"messages": [USER, HELLO], "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
    ],
)
def test_malformed_tools_are_refused_with_their_place(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {message}"):
        read(tmp_path, row)


def test_a_call_is_an_answer_and_has_no_content(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [LOOK]}
    assert read(tmp_path, {"messages": [USER, call]}) == ([USER], [call], None)
    with pytest.raises(DataError, match=r"messages\[1\] must be a message with 'role' and 'content'"):
        read(tmp_path, {"messages": [USER, {"role": "assistant", "content": None}]})


def test_the_first_records_can_be_taken(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": letter} for letter in "abcde"])
    assert [record.prompt for record in read_records(str(path), need="prompt", limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (f"{TALK} Because.", f"{TALK} Be quiet.", TALK),  # the answers begin with the same letters, which are no prompt
        (f"{TALK} Same.", f"{TALK} Same.", TALK),
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("abc", "abd", "ab"),
        ("abc", "xyz", ""),
        ([USER, HELLO], [USER, RUDE], [USER]),
        ([USER, HELLO, USER, HELLO], [USER, HELLO, USER, RUDE], [USER, HELLO, USER]),
        ([USER, HELLO], [USER, HELLO], [USER]),
    ],
)
def test_a_prompt_in_both_answers_is_found(tmp_path, chosen, rejected, prompt):
    assert implicit_prompt(chosen, rejected) == prompt
    if prompt:
        found = read(tmp_path, {"chosen": chosen, "rejected": rejected}, need="rejected")
        assert found == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
        assert read(tmp_path, {"chosen": chosen, "rejected": rejected}, need="prompt")[0] == prompt
    else:
        with pytest.raises(
            DataError, match=r"data\.jsonl:1: 'prompt' is missing, and 'chosen' and 'rejected' do not begin alike"
        ):
            read(tmp_path, {"chosen": chosen, "rejected": rejected})


def test_answers_of_two_kinds_have_no_common_prompt(tmp_path):
    with pytest.raises(DataError, match="must both be texts, or both messages"):
        read(tmp_path, {"chosen": "a", "rejected": [USER, RUDE]})


def test_parts_of_a_hub_data_set_are_its_librarys(tmp_path, monkeypatch):
    """What `dataset_split`, `dataset_config` and `dataset_data_dir` say goes to `datasets`, which takes the split apart."""
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": str(i)} for i in range(10)])
    load, asked = datasets.load_dataset, []

    def from_here(name, config, *, data_dir, split):
        asked.append((name, config, data_dir))
        return load("json", data_files={"train_sft": str(path)}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_here)

    def prompts(split):
        how = DataOptions(dataset_split=split, dataset_config="main", dataset_data_dir="helpful-base")
        return [record.prompt for record in read_records("some/data", need="prompt", how=how)]

    assert prompts("train_sft[:3]") == ["0", "1", "2"]
    assert prompts("train_sft[7:9]") == ["7", "8"]
    assert prompts("train_sft[:2]+train_sft[-2:]") == ["0", "1", "8", "9"]
    assert set(asked) == {("some/data", "main", "helpful-base")}
    with pytest.raises(DataError, match="the hub gave no data set of that name"):
        prompts("test")


def test_a_data_set_in_the_cache_is_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert not is_cached("some/data")
    (tmp_path / "some___data").mkdir()
    assert is_cached("some/data")


def test_objects_of_a_parquet_column_have_their_own_fields_alone(tmp_path):
    """A column has one type: pyarrow fills the fields of the other rows' objects with nulls."""
    tool = {"city": {"type": "string"}}, {"expr": {"type": "string"}}
    rows = [
        {
            "messages": [USER, {**HELLO, "tool_calls": [{"function": {"name": "f", "arguments": dict.fromkeys(one, 1)}}]}],
            "tools": [{"name": "f", "properties": one}],
            "chat_template_kwargs": kwargs,
        }
        for one, kwargs in zip(tool, ({"style": "s"}, {"thinking": True}), strict=True)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    write_rows(tmp_path / "data.jsonl", rows)
    typed, plain = (
        [(r.prompt, r.chosen) for r in read_records(str(tmp_path / name))] for name in ("data.parquet", "data.jsonl")
    )
    assert typed == plain


@pytest.mark.parametrize(("field", "empty"), [("tools", "[]"), ("tools", "null"), ("chat_template_kwargs", "{}")])
def test_empty_fields_as_texts_are_none(tmp_path, field, empty):
    assert read(tmp_path, {"prompt": "hi", "completion": "hello", field: empty}) == ("hi", "hello", None)
    assert read(tmp_path, {"messages": [USER, HELLO], field: empty}) == ([USER], [HELLO], None)


def test_tools_may_be_texts_each(tmp_path):
    assert read(tmp_path, {"messages": [USER, HELLO], "tools": [json.dumps(LOOK)]})[0]["tools"] == [LOOK]
