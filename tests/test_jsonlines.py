"""Resumable output: interrupted anywhere, it ends as if it had not been; another run's remains are refused."""

import json
from itertools import pairwise

import pytest

from trimtab.errors import InvalidOption
from trimtab.jsonlines import ResumableLines

HEADER = {"seed": 3, "prompts": "abc"}
GROUPS = [[{"text": f"{i}-{j} é\u2028\r\n"} for j in range(2)] for i in range(4)]


def write(path, stop=None, header=HEADER):
    """Write what is left of the groups, up to `stop`, which stands for a kill."""
    with ResumableLines(path, header, group=2) as lines:
        for group in GROUPS[lines.done : stop]:
            lines.write(group)
        if stop is not None:
            raise KeyboardInterrupt
    return path.read_bytes()


def done(path, header=HEADER):
    """How many groups are there already."""
    lines = ResumableLines(path, header, group=2)
    with pytest.raises(KeyboardInterrupt), lines:
        raise KeyboardInterrupt
    return lines.done


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole.jsonl")


def test_a_whole_file_has_the_rows_and_nothing_else(whole, tmp_path):
    assert [json.loads(line) for line in whole.decode().split("\n")[:-1]] == [row for group in GROUPS for row in group]
    assert [path.name for path in tmp_path.iterdir()] == ["whole.jsonl"]


@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_file_ends_with_the_same_bytes(whole, tmp_path, stop):
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=stop)
    assert not out.exists()
    assert done(out) == stop
    assert write(out) == whole


def test_a_kill_at_any_byte_loses_at_most_the_group_in_work(whole, tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=4)
    data = partial.read_bytes()
    ends = [0]
    for line in data.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    found = []
    for size in range(len(data) + 1):
        partial.write_bytes(data[:size])
        found.append(done(out))
        lines = sum(end <= size for end in ends[1:])
        assert found[-1] == max(lines - 1, 0) // 2
    assert all(a <= b for a, b in pairwise(found))
    assert write(out) == whole


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("earlier\n")
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=2)
    assert out.read_text() == "earlier\n"


def test_the_remains_of_another_run_are_refused_by_what_differs(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=2)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(InvalidOption, match=r"out\.jsonl\.partial is left from a run with other seed: finish"):
        write(out, header=HEADER | {"seed": 4})
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InvalidOption, match="is a folder; name a file"):
        ResumableLines(tmp_path, HEADER)


def test_a_file_of_the_users_is_not_taken_for_remains(tmp_path):
    (tmp_path / "out.jsonl.partial").write_text("my notes")
    with pytest.raises(InvalidOption, match="left from a run with other"):
        write(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.partial").read_text() == "my notes"
