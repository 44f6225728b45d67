"""A file of JSON lines that only grows: the mechanism under everything that is kept so that a killed run goes on.

`Journal` keeps answers by key in one, `ResumableLines` rows in order behind a header. Both are plain files that people read
with `tail` and `jq`. What they share is here: one process at a time, a line that is on disk when `append` returns, and a torn
last line, which a kill leaves, cut off.
"""

import errno
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from trimtab.files import named_errors, only_writer

__all__ = ["KeptLines"]


class KeptLines:
    """Lines on disk, as a context manager. Inside it, look at `lines` and `torn`, say what to `keep`, and `append`.

    Args:
        path: the file; it need not be there yet.
        called: what errors of the system call it. Default: `path`.

    Raises:
        InvalidOption: another process has it.
    """

    def __init__(self, path: Path, called: Path | None = None) -> None:
        self.path, self._called = path, called or path
        self._lock = threading.Lock()
        self.lines: list[bytes] = []
        """The whole lines that were there, without their ends; until `keep`."""
        self.torn = b""
        """What stood behind the last whole line."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(only_writer(self.path.with_name(f".{self.path.name}.lock")))
            stack.enter_context(named_errors(self._called))
            data = self.path.read_bytes() if self.path.exists() else b""
            *self.lines, self.torn = data.split(b"\n")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def keep(self, count: int) -> None:
        """Cut off everything behind the first so many lines, and get ready to append."""
        size = sum(len(line) + 1 for line in self.lines[:count])
        if self.path.exists() and size < self.path.stat().st_size:
            os.truncate(self.path, size)
        self.lines, self.torn = [], b""
        self._stream = self._stack.enter_context(open(self.path, "ab", buffering=0))  # noqa: SIM115 - it is closed with the stack

    def append(self, text: str) -> None:
        """Add whole lines, ends included: they are on disk when this returns, or none of them is. Any thread may call it."""
        data = text.encode()
        with self._lock:
            size = self._stream.seek(0, os.SEEK_END)
            try:
                if (self._stream.write(data) or 0) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._called))
                os.fsync(self._stream.fileno())
            except BaseException:
                self._stream.truncate(size)
                raise
