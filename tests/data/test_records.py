"""Data sets in every layout and file format, what is said of a bad one, and the way from records to token ids."""

import gzip
import hashlib
import json
import logging
import pickle
import tracemalloc
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer
from tiny_task import write_rows
from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, answers, encode_records, fingerprint_examples, split_by_prompt
from trimtab.data.records import Record, read_records
from trimtab.data.sources import read_rows
from trimtab.errors import DataError
from trimtab.files import json_digest

USER = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
RUDE = {"role": "assistant", "content": "what"}
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any], str]] = {
    "completion": ({"prompt": "hi", "completion": "hello"}, ("hi", "hello", None), "chosen"),
    "empty completion": ({"prompt": "hi", "completion": ""}, ("hi", "", None), "chosen"),
    "pair": ({"prompt": "hi", "chosen": "hello", "rejected": "what"}, ("hi", "hello", "what"), "rejected"),
    "prompt": ({"prompt": "hi"}, ("hi", None, None), "prompt"),
    "further columns": ({"prompt": "hi", "completion": "hello", "score": 3}, ("hi", "hello", None), "chosen"),
    "chosen wins": ({"prompt": "hi", "completion": "no", "chosen": "hello"}, ("hi", "hello", None), "chosen"),
    "chat completion": ({"prompt": [USER], "completion": [HELLO]}, ([USER], [HELLO], None), "chosen"),
    "chat pair": ({"prompt": [USER], "chosen": [HELLO], "rejected": [RUDE]}, ([USER], [HELLO], [RUDE]), "rejected"),
    "chat pair with the prompt repeated": (
        {"prompt": [USER], "chosen": [USER, HELLO], "rejected": [USER, RUDE]},
        ([USER], [HELLO], [RUDE]),
        "rejected",
    ),
    "a pair beside its messages": (
        {"messages": [USER, HELLO], "chosen": [USER, HELLO], "rejected": [USER, RUDE]},
        ([USER], [HELLO], [RUDE]),
        "rejected",
    ),
    "a message alone": ({"prompt": USER, "completion": HELLO}, ([USER], [HELLO], None), "chosen"),
    "chat prompt": ({"prompt": [USER]}, ([USER], None, None), "prompt"),
    "messages": ({"messages": [USER, HELLO]}, ([USER], [HELLO], None), "chosen"),
    "messages of two turns": (
        {"messages": [USER, RUDE, USER, HELLO]},
        ([USER, RUDE, USER], [HELLO], None),
        "chosen",
    ),
    "messages without an answer": ({"messages": [USER]}, ([USER], None, None), "prompt"),
    "messages with an answer, of which the prompt is wanted": ({"messages": [USER, HELLO]}, ([USER], [HELLO], None), "prompt"),
}


def jsonl(path: Path, *rows: Any) -> str:
    """A file of such rows; a text is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def fields(record: Record) -> tuple[Any, Any, Any]:
    return record.prompt, record.chosen, record.rejected


# ---- files


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_every_layout_reads_alike_from_every_format(name, suffix, tmp_path):
    row, expected, need = LAYOUTS[name]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
        places = [f"{path} row 1", f"{path} row 2"]
    else:
        jsonl(path, row, row)
        places = [f"{path}:1", f"{path}:2"]
    records = read_records(str(path), need=need)
    assert [fields(record) for record in records] == [expected, expected]
    assert [record.source for record in records] == places


def test_a_parquet_table_of_mixed_layouts_fills_up_with_nulls(tmp_path):
    """Rows of a table have all of its columns: a null is what is not there."""
    rows = [{"prompt": "hi", "completion": "hello"}, {"messages": [USER, HELLO]}, {"prompt": "hi", "chosen": "x"}]
    names = ("prompt", "completion", "chosen", "messages")
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    found = [fields(record) for record in read_records(str(tmp_path / "data.parquet"))]
    assert found == [("hi", "hello", None), ([USER], [HELLO], None), ("hi", "x", None)]


def test_blank_lines_are_passed_over_but_counted(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", {"prompt": "a"}, "", "   ", {"prompt": "b"})
    assert [place for place, _ in read_rows(path)] == [f"{path}:1", f"{path}:4"]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "data.jsonl", {"prompt": "a"})
    assert read_records("~/data.jsonl", need="prompt")[0].source == "~/data.jsonl:1"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("prompt", "not JSON"),
        ("[1]", "must be a JSON object, not list"),
        ('"text"', "must be a JSON object, not str"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_malformed_line_is_named_by_its_number(line, problem, suffix, tmp_path):
    path = jsonl(tmp_path / f"data{suffix}", {"prompt": "a"}, "", line, {"prompt": "b"})
    with pytest.raises(DataError) as caught:
        read_records(path, need="prompt")
    assert str(caught.value).startswith(f"{path}:3: {problem}")


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: not JSON"):
        read_records(str(tmp_path / "data.jsonl"), need="prompt")


ROWS = [
    ({}, "prompt", "'prompt' is missing; it has: nothing"),
    ({"text": "a", "label": 1}, "prompt", "'prompt' is missing; it has: text, label"),
    ({"prompt": None, "completion": "b"}, "chosen", "'prompt' is missing; it has: prompt, completion"),
    ({"prompt": "", "completion": "b"}, "chosen", "'prompt' is empty"),
    ({"prompt": [], "completion": []}, "chosen", "'prompt' is empty"),
    ({"prompt": 3, "completion": "b"}, "chosen", "'prompt' must be a text or a list of messages, not int"),
    ({"prompt": ["a"], "completion": "b"}, "chosen", "'prompt' must be a text or a list of messages, not list"),
    ({"prompt": "a", "completion": 3}, "chosen", "'completion' must be a text or a list of messages, not int"),
    ({"prompt": "a", "completion": [HELLO]}, "chosen", "'completion' must be a text like 'prompt'"),
    ({"prompt": "a"}, "chosen", "has neither 'completion' nor 'chosen'; it has: prompt"),
    ({"prompt": "a", "rejected": "b"}, "chosen", "has neither 'completion' nor 'chosen'; it has: prompt, rejected"),
    ({"prompt": "a", "completion": "b"}, "rejected", "'rejected' is missing, which this objective needs"),
    ({"messages": [USER, HELLO]}, "rejected", "'rejected' is missing, which this objective needs; 'messages' hold"),
    ({"prompt": [USER], "completion": [HELLO, USER]}, "chosen", "'completion' must end with the assistant's message, not"),
    ({"prompt": [USER], "chosen": [HELLO], "rejected": [USER, USER]}, "rejected", "'rejected' must end with the assistant's"),
    ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "chosen", "has neither 'completion' nor 'chosen'"),
    ({"prompt": "a", "completion": "b", "images": [{"path": "x.png"}]}, "chosen", "has images, which no model here sees"),
    ({"prompt": "a", "image": {"bytes": None, "path": "x.png"}}, "prompt", "has images, which no model here sees"),
    ({"messages": [USER]}, "chosen", "'messages' must be a conversation that ends with the assistant's answer"),
    ({"messages": [HELLO]}, "chosen", "'messages' must be a conversation that ends"),
    ({"messages": []}, "prompt", "'messages' must be a conversation that ends"),
    ({"messages": "hi"}, "prompt", "'messages' must be a conversation that ends"),
    ({"messages": [USER, "hello"]}, "prompt", "'messages' must be a conversation that ends"),
    ({"messages": [USER, "hello"]}, "chosen", "'messages' must be a conversation that ends"),
]


@pytest.mark.parametrize(("row", "need", "problem"), ROWS)
def test_a_bad_row_is_named_with_what_is_wrong(row, need, problem, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(DataError) as caught:
        read_records(path, need=need)
    assert str(caught.value).startswith(f"{path}:2: {problem}")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_file_without_records_is_an_error(suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    else:
        jsonl(path)
    with pytest.raises(DataError, match="holds no records"):
        read_records(str(path))


def test_a_truncated_gzip_is_named_with_the_last_good_line(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    rows = [json.dumps({"prompt": f"{i * 7919 % 10007} {i * i}"}) + "\n" for i in range(2000)]
    whole = gzip.compress("".join(rows).encode())
    path.write_bytes(whole[: len(whole) // 2])
    read = []
    with pytest.raises(DataError, match=r"data\.jsonl\.gz: cannot be read after line \d+") as caught:
        read.extend(read_rows(str(path)))
    assert 0 < len(read) < 2000
    assert f"after line {len(read)}:" in str(caught.value)


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.parquet"])
def test_a_file_that_is_not_what_its_name_says(name, tmp_path):
    (tmp_path / name).write_bytes(b'{"prompt": "a"}\n')
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        read_records(str(tmp_path / name))


def test_other_suffixes_missing_files_and_folders_are_refused(tmp_path):
    (tmp_path / "data.csv").write_text("prompt\na\n")
    with pytest.raises(DataError, match=r"data\.csv: is none of \.jsonl, \.jsonl\.gz, \.parquet"):
        read_records(str(tmp_path / "data.csv"))
    with pytest.raises(DataError, match=r"is a folder; give one of its files"):
        read_records(str(tmp_path))
    for name in (str(tmp_path / "gone"), "gone.jsonl", "gone.parquet", "gone.jsonl.gz", "a/b/c"):
        with pytest.raises(DataError, match="there is no such file"):
            read_records(name)


# ---- from records to ids


def record(prompt: Any, chosen: Any, rejected: Any = None) -> Record:
    return Record(prompt, chosen, rejected, "data.jsonl:7")


def test_texts_are_encoded_with_the_end_of_sequence():
    """a is 1, b is 2, and so on in the tiny tokenizer."""
    examples = encode_records([record("ab", "c", "de"), record("b", "")], Encoder(tiny_tokenizer(), 28, [EOS]), 10)
    assert examples == [Example([1, 2], [3, EOS], [4, 5, EOS]), Example([2], [EOS], [])]


def test_chats_are_encoded_by_the_template():
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    [example] = encode_records([record([{"role": "user", "content": "b"}], [HELLO], [RUDE])], Encoder(tokenizer, 28, [EOS]), 40)
    space = 27
    assert example.prompt.tolist() == [21, space, 2, EOS, 1, space]
    assert example.chosen.tolist() == [*(ord(letter) - 96 for letter in "hello"), EOS]
    assert example.rejected.tolist() == [*(ord(letter) - 96 for letter in "what"), EOS]


def test_answers_are_cut_and_long_prompts_left_out_and_both_are_counted(caplog):
    """Room for an answer is what the prompt leaves of max_length; at least one token of it must fit."""
    records = [
        record("abc", "de"),
        record("abcd", "ef"),
        record("abcdef", "g"),
        record("abcdefg", "h"),
        record("ab", "c", "defgh"),
    ]
    with caplog.at_level(logging.WARNING, "trimtab"):
        examples = encode_records(records, Encoder(tiny_tokenizer(), 28, [EOS]), 6)
    assert examples == [
        Example([1, 2, 3], [4, 5, EOS], []),
        Example([1, 2, 3, 4], [5, 6], []),
        Example([1, 2], [3, EOS], [4, 5, 6, 7]),
    ]
    [line] = [entry.getMessage() for entry in caplog.records]
    assert line == (
        "of 5 records, 2 (40 %) had an answer cut at max_length=6, which teaches no end, and 2 a longer prompt, left out;"
        " a larger max_length keeps them whole"
    )


def test_nothing_is_said_where_everything_fits(caplog):
    with caplog.at_level(logging.INFO, "trimtab"):
        encode_records([record("ab", "c")], Encoder(tiny_tokenizer(), 28, [EOS]), 4)
    assert caplog.records == []


def test_no_record_left_is_an_error():
    with pytest.raises(DataError, match="no record is left: every prompt has 3 tokens or more; raise max_length"):
        encode_records([record("abc", "d"), record("abcd", "d")], Encoder(tiny_tokenizer(), 28, [EOS]), 3)


def test_what_cannot_be_encoded_is_named_by_its_place():
    with pytest.raises(DataError, match=r"data\.jsonl:7: prompt is a chat, but the tokenizer has no chat template"):
        encode_records([record([USER], [HELLO])], Encoder(tiny_tokenizer(), 28, [EOS]), 10)


def test_fingerprints_see_what_they_should():
    """The cache depends on prompts and wanted answers in their order; a run on unwanted answers too."""
    base = [Example([1], [2, 0], [3]), Example([4], [5], [])]
    others = [base[::-1], [Example([1], [2], [3]), base[1]], [Example([1, 2], [0], [3]), base[1]], base[:1]]
    assert len({fingerprint_examples(examples) for examples in [base, *others]}) == 5
    rejected = [base[0]._replace(rejected=[4]), base[1]]
    assert fingerprint_examples(rejected) == fingerprint_examples(base)
    assert fingerprint_examples(rejected, rejected=True) != fingerprint_examples(base, rejected=True)


def test_ids_take_four_bytes_a_token_and_fingerprints_no_string_of_everything():
    """Ids above 256 are objects of 28 bytes in a list, with 8 for the place: 36. A digest needs one example at a time."""
    tokenizer = tiny_tokenizer("".join(chr(i) for i in range(0x4E00, 0x5200)))
    text = "".join(chr(0x4F01 + i) for i in range(250))
    records = [record(text, text, text) for _ in range(300)]
    tracemalloc.start()
    try:
        examples = encode_records(records, Encoder(tokenizer, len(tokenizer), [EOS]), 1000)
        tokens, size = sum(len(ids) for example in examples for ids in example[:4]), tracemalloc.get_traced_memory()[0]
        assert tokens == 300 * 752
        assert size < 8 * tokens
        unwanted, before = answers(examples, "rejected"), tracemalloc.get_traced_memory()[0]
        assert before - size < tokens
        tracemalloc.reset_peak()
        fingerprint_examples(unwanted, rejected=True)
        assert tracemalloc.get_traced_memory()[1] - before < 0.5 * tokens
    finally:
        tracemalloc.stop()


def test_an_example_is_of_arrays_however_it_is_made():
    """And equal where its ids are."""
    made = [Example([1], (2, 0), [3]), Example(array("i", [1]), [2, 0], iter([3]))]
    assert made[0] == made[1] != Example([1], [2], [3])
    assert {type(ids) for example in [*made, pickle.loads(pickle.dumps(made[0]))] for ids in example[:4]} == {array}
    assert pickle.loads(pickle.dumps(Example([1], [2], [3], weight=2.5))).weight == 2.5


def test_a_digest_is_that_of_one_string_of_everything():
    """So runs and caches that are there already go on."""
    for values in ([], ["a"], ["a", [{"role": "user", "content": "ü\ud83d"}], {"b": None}, 1.5]):
        assert json_digest(iter(values)) == hashlib.sha256(json.dumps(values).encode()).hexdigest()
    examples = [Example([1], [2, 0], [3]), Example([4], [5], [])]
    for width in (2, 3):
        whole = json.dumps([[list(ids) for ids in example[:width]] for example in examples])
        assert fingerprint_examples(examples, rejected=width == 3) == hashlib.sha256(whole.encode()).hexdigest()


# ---- the split


def test_all_answers_to_a_prompt_are_on_one_side():
    """Twenty prompts, text and chat, with three answers each; a quarter of the prompts is five."""
    prompts: list[Any] = [f"prompt {i}" for i in range(10)] + [[{"role": "user", "content": str(i)}] for i in range(10)]
    records = [record(prompt, answer) for answer in "abc" for prompt in prompts]
    train, held_out = split_by_prompt(records, 0.25, seed=0)
    sides = [{json.dumps(item.prompt) for item in side} for side in (train, held_out)]
    assert len(sides[1]) == 5
    assert len(sides[0]) == 15
    assert len(held_out) == 15
    assert train == [item for item in records if item in train], "the order of the records stays"
    assert train + held_out != records
    assert sorted(map(repr, train + held_out)) == sorted(map(repr, records))


def test_the_split_is_a_function_of_prompts_and_seed_alone():
    """Other answers, another order and prompts written with other key orders leave every prompt on its side."""
    records = [record([{"role": "user", "content": str(i)}], "a") for i in range(40)]
    turned = [record([{"content": str(i), "role": "user"}], "b") for i in reversed(range(40))]
    held_out = [item.prompt for item in split_by_prompt(records, 0.3, seed=0)[1]]
    assert [item.prompt for item in split_by_prompt(turned, 0.3, seed=0)[1]] == held_out[::-1]
    assert [item.prompt for item in split_by_prompt(records, 0.3, seed=1)[1]] != held_out


@pytest.mark.parametrize(("fraction", "expected"), [(1e-9, 1), (0.5, 2), (0.9, 2)])
def test_no_side_is_empty(fraction, expected):
    records = [record(prompt, "a") for prompt in "abc"]
    train, held_out = split_by_prompt(records, fraction, seed=0)
    assert (len(train), len(held_out)) == (3 - expected, expected)


def test_one_prompt_cannot_be_split():
    with pytest.raises(DataError, match="all records share one prompt"):
        split_by_prompt([record("a", "b"), record("a", "c")], 0.5, seed=0)


def test_other_columns_come_along_if_they_are_asked_for(tmp_path):
    """All but prompt, completion and completion_ids, which is what TRL gives a reward function; mapped ones by their field."""
    row = {"prompt": "a", "completion": "b", "completion_ids": [1], "answer": "42", "tests": ["x"], "chosen": None}
    write_rows(tmp_path / "d.jsonl", [row])
    path = str(tmp_path / "d.jsonl")
    assert read_records(path)[0].columns == {}
    for wanted in (True, False):
        (record,) = read_records(path, need="prompt", answers=wanted, others=True)
        assert record.columns == {"answer": "42", "tests": ["x"], "chosen": None}
    how = SimpleNamespace(
        dataset_split="train", dataset_config=None, dataset_data_dir=None, columns=("prompt=answer", "chosen=completion")
    )
    (record,) = read_records(path, how=how, others=True)
    assert (record.prompt, record.columns) == ("42", {"chosen": "b", "tests": ["x"]})
