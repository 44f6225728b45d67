"""Write files so that a crash, a kill or a full disk leaves what was there before, whole."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from trimtab.errors import DataError, InvalidOption

__all__ = [
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "expand_home",
    "finite",
    "json_digest",
    "named_errors",
    "only_writer",
    "read_json",
    "remove_leftovers",
    "write_json",
]

LEFTOVERS = ".*.partial"
"""How everything is called that a kill may leave behind."""


def cache_folder(name: str) -> Path | None:
    """Where the user's caches of one kind are, whether it exists or not; None where the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    folder = expand_home(root if os.path.isabs(root) else "~/.cache") / "trimtab" / name
    return folder if folder.is_absolute() else None


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` only when the block ends without an error.

    A target that exists and is no regular file (a terminal, a pipe, /dev/full) is written to directly.
    """
    path = Path(path).resolve()  # a link stays, and what it leads to is replaced
    encoding = None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with named_errors(path), open(path, mode, encoding=encoding) as stream:
            yield stream
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with named_errors(path), os.fdopen(descriptor, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, superseded: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder whose files move into `path`, by renaming alone, when the block ends without an error.

    The empty folder is inside `path`, which may be a mount point of its own, and is hidden there until then.

    Files already in `path` that match a pattern of `superseded` and were not written again are removed; others stay.

    Raises:
        NotADirectoryError: `path` is a file; said before the block begins.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder should be", str(path))
    path.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    staging = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=path))
    try:
        with named_errors(path):
            yield staging
        written = {item.relative_to(staging) for item in staging.rglob("*")}
        for item in sorted(staging.rglob("*")):
            target = path / item.relative_to(staging)
            if item.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(item, target)
        for pattern in superseded:
            for old in path.glob(pattern):
                if old.relative_to(path) not in written and old.is_file():
                    old.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # still empty if it was made here and nothing came of it
            path.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder while they wrote into it."""
    for item in folder.glob(LEFTOVERS):
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold `path` as a lock; it goes away with the block, and with the process.

    Raises:
        InvalidOption: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path, timeout=0):
            yield
            path.unlink(missing_ok=True)
    except filelock.Timeout:
        raise InvalidOption(f"another process is writing {path.parent}: wait for it, or name another place") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def finite(value: Any) -> Any:
    """The same for JSON, which has no infinity and no NaN: they are said in words, however deep they stand."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Read one JSON file.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path to an error of the system that lacks it, and say of a full disk that it is one.

    Libraries report a full disk in their own words, as any kind of error; what tells is that nothing is free.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        if shutil.disk_usage(path if path.exists() else path.parent).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def expand_home(path: str | Path) -> Path:
    """The path with `~` resolved; as it is where nobody has such a home, and so leads nowhere."""
    return Path(os.path.expanduser(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_digest(values: Iterable[Any]) -> str:
    """SHA-256 of values as one JSON list, which is never in memory as a whole."""
    digest, between = hashlib.sha256(b"["), ""
    for value in values:
        digest.update(f"{between}{json.dumps(value)}".encode())
        between = ", "
    digest.update(b"]")
    return digest.hexdigest()


def check_writable(out: str, *, folder: bool) -> None:
    """Refuse an --out that cannot be written, before anything is read for it: a folder, or a file."""
    path = Path(out)
    if not folder and path.is_dir():
        raise InvalidOption(f"--out {out} is a folder: name a file")
    if path.exists() and not path.is_dir() and not path.is_file():
        return  # a device, or a pipe
    parent = path if folder else path.absolute().parent
    there = next(place for place in (parent, *parent.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InvalidOption(f"--out {out}: {there} is a file: name a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InvalidOption(f"--out {out}: nothing can be written in {there}: {error.strerror}") from error


def refuse_overwriting(out: str, source: str | None) -> None:
    """Refuse to replace what is read, and to write where nothing can be written."""
    check_writable(out, folder=False)
    if source is not None and Path(out).exists() and Path(source).exists() and Path(out).samefile(source):
        raise InvalidOption(f"--out {out} would replace the data that it is made from: name another file")
