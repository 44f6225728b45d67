"""Writing files: whatever happens, what stood there before stays whole, or what is new is complete."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab.files import atomic_folder, atomic_write, finite, named_errors, only_writer, read_json, write_json


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder with its content."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """A known mask: files are made with 640, folders with 750."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


class Interrupt(BaseException):
    """What a keyboard does."""


# ---- values


def test_what_json_has_no_number_for_is_said_in_words_however_deep():
    assert finite({"a": [1.5, float("inf")], "b": (float("-inf"), {"c": float("nan")})}) == {
        "a": [1.5, "inf"],
        "b": ["-inf", {"c": "nan"}],
    }


# ---- one file


def test_a_file_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    with atomic_write(path) as stream:
        stream.write("né\n")
        stream.flush()
        assert not path.exists()
    assert path.read_bytes() == "né\n".encode()
    assert tree(tmp_path) == {"deep/er/file.txt": "né\n"}


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(str(path), "wb") as stream:
        stream.write(b"\x00new")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == b"\x00new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, OSError, Interrupt])
@pytest.mark.parametrize("old", [{}, {"file": "old"}], ids=["new", "replaced"])
def test_a_failure_leaves_what_was_there_and_nothing_else(error, old, tmp_path):
    for name, content in old.items():
        (tmp_path / name).write_text(content)

    def fail() -> None:
        with atomic_write(tmp_path / "file") as stream:
            stream.write("half")
            raise error("enough")

    with pytest.raises(error, match="enough"):
        fail()
    assert tree(tmp_path) == old


def test_a_failing_rename_leaves_what_was_there(tmp_path, monkeypatch):
    """The disk refuses at the last moment."""
    (tmp_path / "file").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_write(tmp_path / "file") as stream:
        stream.write("new")
    assert tree(tmp_path) == {"file": "old"}


def test_a_full_device_is_an_error():
    with pytest.raises(OSError, match="No space left"), atomic_write("/dev/full") as stream:
        stream.write("x" * 100_000)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode), "a device is written to, not replaced"


def test_a_device_is_written_to_and_not_replaced():
    with atomic_write("/dev/null") as stream:
        stream.write("gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"), atomic_write(tmp_path / "file") as stream:
        stream.write("x")
    assert (tmp_path / "file" / "inside").is_dir()


@pytest.mark.parametrize("permissions", [0o600, 0o644, 0o755])
def test_permissions_of_an_old_file_are_kept(permissions, tmp_path, umask):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(permissions)
    with atomic_write(path) as stream:
        stream.write("new")
    assert mode(path) == permissions


def test_permissions_of_a_new_file_are_those_of_any_new_file(tmp_path, umask):
    with atomic_write(tmp_path / "file") as stream:
        stream.write("new")
    assert mode(tmp_path / "file") == 0o640
    assert os.umask(umask) == umask, "reading the mask must not change it"


# ---- JSON


def test_json_comes_back_and_is_readable(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"é": "北京"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "北京" in text
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["b", "a"], "keys stay in order"


@pytest.mark.parametrize("value", [{"x": float("nan")}, [float("inf")], {"x": object()}])
def test_what_is_no_json_is_refused_and_the_old_file_stays(value, tmp_path):
    write_json(tmp_path / "x.json", [1])
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == [1]
    assert os.listdir(tmp_path) == ["x.json"]


# ---- folders


def test_a_folder_appears_when_the_block_ends(tmp_path, umask):
    path = tmp_path / "deep" / "folder"
    with atomic_folder(path) as staging:
        (staging / "a").write_text("1")
        (staging / "sub").mkdir()
        (staging / "sub" / "b").write_text("2")
        assert [item.name[0] for item in path.iterdir()] == ["."]
    assert tree(tmp_path) == {"deep/folder/a": "1", "deep/folder/sub/b": "2"}
    assert os.listdir(tmp_path / "deep") == ["folder"]
    assert (mode(path), mode(path / "a")) == (0o750, 0o640)


def test_files_of_a_folder_are_replaced_superseded_or_kept(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    for name in ("a.bin", "b.bin", "old.bin", "notes.txt"):
        (path / name).write_text("old")
    with atomic_folder(str(path), superseded=("*.bin", "*.nothing")) as staging:
        (staging / "a.bin").write_text("new")
        (staging / "b.bin").write_text("new")
        (staging / "c.json").write_text("new")
        shown = {name: text for name, text in tree(path).items() if not name.startswith(".")}
        assert shown == dict.fromkeys(("a.bin", "b.bin", "notes.txt", "old.bin"), "old")
    assert tree(path) == {"a.bin": "new", "b.bin": "new", "c.json": "new", "notes.txt": "old"}
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, Interrupt])
@pytest.mark.parametrize("old", [{}, {"folder/a": "old", "folder/b": "old"}], ids=["new", "replaced"])
def test_a_failure_leaves_the_folder_as_it_was(error, old, tmp_path):
    for name, content in old.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    def fail() -> None:
        with atomic_folder(tmp_path / "folder", superseded=("*",)) as staging:
            (staging / "a").write_text("half")
            raise error("enough")

    with pytest.raises(error, match="enough"):
        fail()
    assert tree(tmp_path) == old
    assert os.listdir(tmp_path) == (["folder"] if old else [])


def test_a_folder_inside_a_folder_is_replaced_too(tmp_path):
    """As a tokenizer with several chat templates writes one, each time it is saved."""
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as staging:
            (staging / "sub").mkdir()
            (staging / "sub" / "a").write_text(content)
            (staging / "z").write_text(content)
    assert tree(tmp_path) == {"folder/sub/a": "second", "folder/z": "second"}


def test_a_file_in_the_way_of_a_folder_is_an_error_and_stays(tmp_path):
    (tmp_path / "folder").write_text("a file")

    def write() -> None:
        with atomic_folder(tmp_path / "folder") as staging:
            (staging / "a").write_text("new")

    with pytest.raises(OSError, match="folder"):
        write()
    assert tree(tmp_path) == {"folder": "a file"}
    assert os.listdir(tmp_path) == ["folder"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".abc.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".file.x.partial").write_text("torn")
    with atomic_folder(tmp_path) as staging:
        (staging / "a").write_text("1")
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as stream:
        stream.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_one_process_writes_at_a_time(tmp_path):
    """The second one is another process: the same one may take its own lock again."""
    script = (
        "import sys, pathlib; from trimtab.files import only_writer\nwith only_writer(pathlib.Path(sys.argv[1])): print('in')"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with only_writer(tmp_path / "lock"):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is writing" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "in\n"


def test_a_full_disk_is_named_whatever_a_library_calls_it(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"No space left on device.*folder"), named_errors(tmp_path / "folder"):
        raise RuntimeError("unexpected pos 55872 vs 55760")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(RuntimeError, match="unexpected pos"), named_errors(tmp_path / "folder"):
        raise RuntimeError("unexpected pos 55872 vs 55760")
