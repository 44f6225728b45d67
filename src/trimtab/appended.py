"""Files of JSON lines that several threads and processes append to; a crash, or a neighbour, spoils no line.

What a crash left of a last line is moved to `FILE.torn` by the next append, so that it spoils neither its file nor the line.
"""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.files import named_errors

__all__ = ["append_row"]

logger = logging.getLogger(__name__)


def append_row(path: Path, row: Mapping[str, Any], called: str) -> None:
    """Add a row as a whole line, or nothing. It is on disk when this returns.

    Args:
        path: the file; it and its folder are made if need be.
        row: anything JSON has.
        called: what messages call it.

    Raises:
        InvalidRequest: it has what JSON has not.
        OSError: the disk is full or cannot be written; nothing of the row is left on it.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError too
        raise InvalidRequest(f"{called} cannot be written as JSON in UTF-8: {error}") from None
    _append_line(path, line)


def _append_line(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path), _locked(path) as descriptor:
        _mend(path, descriptor)
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
        if size == 0:
            _sync_folder(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open for appending, alone among all that do so through here; the lock waits, and ends with the process at the latest."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _mend(path: Path, descriptor: int) -> None:
    """End a last line that lacks its newline, or move it away if it is not whole."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    data = os.pread(descriptor, size, 0)
    start = data.rfind(b"\n") + 1
    torn = data[start:]
    try:
        json.loads(torn)
    except ValueError:
        with open(path.with_name(path.name + ".torn"), "ab") as aside:
            aside.write(torn + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        os.ftruncate(descriptor, start)
        logger.warning("%s: a last line of %d bytes was not whole; moved to %s.torn", path, len(torn), path.name)
    else:
        os.write(descriptor, b"\n")


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file last, as `fsync` makes its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
