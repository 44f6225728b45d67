"""The mechanism under journals and resumable files: whole lines or none, and files of earlier versions go on."""

import json
import os

import pytest

from trimtab.errors import InvalidOption
from trimtab.journal import Journal
from trimtab.jsonlines import ResumableLines, kept_header
from trimtab.kept_lines import KeptLines

JOURNAL = b'{"key": "a", "score": 1.5}\n{"key": "b", "first": 0.25, "said": "m"}\n{"key": "c", "sco'
"""As version 0.1 left it when it was killed."""
PARTIAL = b'{"seed": 3}\n{"text": "\xc3\xa9\xe2\x80\xa8"}\n{"text": "b", "error": "no"}\n{"te'
"""Likewise: `FILE.partial` with a header."""


def test_whole_lines_and_what_is_torn_are_told_apart(tmp_path):
    (tmp_path / "f").write_bytes(b"one\ntwo\nthr")
    with KeptLines(tmp_path / "f") as kept:
        assert (kept.lines, kept.torn) == ([b"one", b"two"], b"thr")
        kept.keep(1)
        kept.append("2\n3\n")
    assert (tmp_path / "f").read_bytes() == b"one\n2\n3\n"


def test_nothing_is_cut_before_it_is_said_what_to_keep(tmp_path):
    (tmp_path / "f").write_bytes(b"my notes")
    with pytest.raises(KeyboardInterrupt), KeptLines(tmp_path / "f"):
        raise KeyboardInterrupt
    assert (tmp_path / "f").read_bytes() == b"my notes"


def test_a_write_that_fails_leaves_nothing_of_itself(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(28, "No space left on device")

    with KeptLines(tmp_path / "f") as kept:
        kept.keep(0)
        kept.append("one\n")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(OSError, match="No space"):
                kept.append("two\nthree\n")
        kept.append("four\n")
    assert (tmp_path / "f").read_bytes() == b"one\nfour\n"


def test_one_process_at_a_time_has_it(tmp_path):
    with KeptLines(tmp_path / "f"), pytest.raises(InvalidOption, match="another process"), KeptLines(tmp_path / "f"):
        pass


def test_a_journal_of_an_earlier_version_goes_on(tmp_path):
    (tmp_path / "j.jsonl").write_bytes(JOURNAL)
    with Journal(tmp_path / "j.jsonl") as journal:
        assert (journal["a"], journal["b"], journal.get("c")) == ({"score": 1.5}, {"first": 0.25, "said": "m"}, None)
        journal.add("c", {"score": 2.0})
    lines = (tmp_path / "j.jsonl").read_bytes().split(b"\n")
    assert lines == [*JOURNAL.split(b"\n")[:2], b'{"key": "c", "score": 2.0}', b""]


def test_a_partial_file_of_an_earlier_version_goes_on(tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_bytes(PARTIAL)
    assert kept_header(out) == {"seed": 3}
    with ResumableLines(out, {"seed": 3}) as lines:
        assert (lines.done, lines.failed) == (2, 1)
        lines.write([{"text": "c"}])
    assert out.read_bytes() == b"\n".join([*PARTIAL.split(b"\n")[1:3], b'{"text": "c"}', b""])
    assert json.loads(out.read_bytes().splitlines()[0])["text"] == "é\u2028"
