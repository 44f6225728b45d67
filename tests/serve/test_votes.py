"""Votes are what training reads, and neither a crash nor a neighbour spoils one."""

import json
import multiprocessing
import os
import threading

import pytest

from trimtab.data.records import Record, read_records
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.serve.playground.votes import VoteBook

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def lines(path):
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


@pytest.fixture
def book(tmp_path):
    return VoteBook(tmp_path / "arena" / "votes.jsonl")


def test_votes_are_what_training_reads(book):
    """With every fact that might disturb it, after ties, and with texts that break lines elsewhere."""
    facts = {"models": ["base", "polite"], "rule": "product", "weight": [1, 0.5], "seed": 3, "time": "2026-01-01T00:00:00Z"}
    book.append("p\u2028\n", "l\x85", "r", "left", **facts)
    book.append("p", "l", "r", "tie", **facts)
    book.append("p", "l", "", "right", **facts)
    book.append(CHAT, "l", "r", "right", **facts)
    book.append(CHAT, "l", "r", "both_bad", **facts)
    name = str(book.path)
    assert read_records(name, need="rejected") == [
        Record("p\u2028\n", "l\x85", "r", f"{name}:1"),
        Record("p", "", "l", f"{name}:2"),
        Record(CHAT, said("r"), said("l"), f"{name}:3"),
    ]
    assert lines(book.ties) == [
        {"prompt": "p", "left": "l", "right": "r", "verdict": "tie", **facts},
        {"prompt": CHAT, "left": said("l"), "right": said("r"), "verdict": "both_bad", **facts},
    ]


def test_a_vote_is_returned_as_it_was_written(book):
    record = book.append("p", "l", "r", "right", seed=3)
    assert record == {"prompt": "p", "chosen": "r", "rejected": "l", "verdict": "right", "seed": 3}
    assert lines(book.path) == [record]
    assert not book.ties.exists()


@pytest.mark.parametrize(
    ("vote", "message"),
    [
        (("p", "l", "r", "both"), "verdict must be one of left, right, tie, both_bad, not 'both'"),
        (("", "l", "r", "left"), "prompt is empty"),
        (([], "l", "r", "left"), "prompt is empty"),
        (([1, 2], "l", "r", "left"), r"prompt\[0\] must be a message"),
        (([*CHAT, {"role": "user"}], "l", "r", "left"), r"prompt\[2\] must be a message"),
        (([{"role": "user", "content": [{"type": "text"}]}], "l", "r", "left"), r"prompt\[0\] must be a message"),
        (("p", None, "r", "left"), "left and right must be texts"),
        (("p", "l", said("r"), "tie"), "left and right must be texts"),
        (("p", "\ud800", "r", "left"), "cannot be written"),
    ],
)
def test_a_vote_that_could_not_be_trained_on_is_refused(book, vote, message):
    with pytest.raises(InvalidRequest, match=message):
        book.append(*vote)
    assert not book.path.exists()
    assert not book.ties.exists()


@pytest.mark.parametrize(
    "facts", [{"chosen": 1}, {"messages": []}, {"completion": ""}, {"logp": float("nan")}, {"x": object()}]
)
def test_facts_that_would_disturb_are_refused(book, facts):
    with pytest.raises(InvalidRequest):
        book.append("p", "l", "r", "left", **facts)
    assert not book.path.exists()


def test_the_book_is_a_jsonl_file(tmp_path):
    with pytest.raises(InvalidOption, match=r"must end in \.jsonl"):
        VoteBook(tmp_path / "votes.json")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InvalidOption, match="is a folder"):
        VoteBook(tmp_path / "folder.jsonl")


def test_a_crash_at_any_byte_spoils_nothing(book):
    """The whole votes before it stay, the torn one is set aside, and the next is a line of its own."""
    first = book.append("p", "l", "r", "left", note="é🙂")
    start = book.path.stat().st_size
    second = book.append("q", "l", "r", "right")
    data = book.path.read_bytes()
    torn = book.path.with_name("votes.jsonl.torn")
    for size in range(len(data) + 1):
        book.path.write_bytes(data[:size])
        torn.unlink(missing_ok=True)
        last = book.append("last", "l", "r", "left")
        whole = [first] * (size >= start - 1) + [second] * (size >= len(data) - 1)
        assert lines(book.path) == [*whole, last]
        kept = data[: size if size not in (start - 1, len(data) - 1) else 0]
        cut = kept[kept.rfind(b"\n") + 1 :]
        assert (torn.read_bytes() if torn.exists() else b"") == (cut + b"\n" if cut else b"")


def test_training_would_stumble_over_a_torn_line(book):
    """So mending is needed: this is what it prevents."""
    book.append("p", "l", "r", "left")
    book.path.write_bytes(book.path.read_bytes() + b'{"prompt": "q", "cho')
    with pytest.raises(DataError, match="not JSON"):
        read_records(str(book.path))
    book.append("p", "l", "r", "left")
    assert len(read_records(str(book.path))) == 2


def _vote(path, writer, count):
    book = VoteBook(path)
    for i in range(count):
        book.append("p" * 5000, f"{writer}", f"{i}", "left" if i % 2 else "tie")


def _expect(book, writers, count):
    found = [
        (row.get("chosen", row.get("left")), row.get("rejected", row.get("right")))
        for row in lines(book.path) + lines(book.ties)
    ]
    assert sorted(found) == sorted((str(writer), str(i)) for writer in range(writers) for i in range(count))


def test_processes_append_side_by_side(book):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_vote, args=(book.path, writer, 20)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    _expect(book, 3, 20)


def test_threads_append_side_by_side(book):
    writers = [threading.Thread(target=_vote, args=(book.path, writer, 20)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    _expect(book, 4, 20)


def test_a_full_disk_leaves_nothing_of_a_vote(book, monkeypatch):
    before = book.append("p", "l", "r", "left")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        with pytest.raises(OSError, match="No space left") as info:
            book.append("q", "l", "r", "left")
    assert info.value.filename == str(book.path)
    assert lines(book.path) == [before]


def test_the_vote_is_synced_before_append_returns(book, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), fsync(descriptor)))
    book.append("p", "l", "r", "left")
    assert book.path.stat().st_size in synced
