"""A JSON Lines file that is written as results come, survives a kill, and appears under its name only when it is whole."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from trimtab.errors import InvalidOption
from trimtab.files import atomic_write, named_errors, only_writer

__all__ = ["ResumableLines", "kept_header"]

logger = logging.getLogger(__name__)


def kept_header(out: str | Path) -> dict[str, Any]:
    """What the run that `out` was left from has written of itself; empty if there is none."""
    with contextlib.suppress(OSError, ValueError), open(_partial_of(Path(out)), encoding="utf-8") as stream:
        found = json.loads(stream.readline())
        return found if isinstance(found, dict) else {}
    return {}


def _partial_of(out: Path) -> Path:
    special = out.exists() and not out.is_file()
    return Path(f"{out.name}.partial") if special else out.with_name(out.name + ".partial")


class ResumableLines:
    """Rows in groups of equal size (the samples of one prompt, say), written group by group to `FILE.partial`.

    The partial file's first line describes the run; only a run with the same description goes on with it. A torn last line,
    or part of a group, is dropped. A target that is no regular file is written at the end, from the partial file. One process
    at a time writes it. A row with an `error` stands for what could not be made; it counts as written, and is not tried again.

    Args:
        out: the file to be.
        header: what the rows depend on.
        group: rows in a group.

    Raises:
        InvalidOption: `out` is a folder, the partial file is of another run, or another process is writing it.
    """

    def __init__(self, out: str | Path, header: Mapping[str, Any], group: int = 1) -> None:
        self._out = Path(out)
        if self._out.is_dir():
            raise InvalidOption(f"out: {out} is a folder; name a file")
        self._partial = _partial_of(self._out)
        self._header = json.loads(json.dumps(header, default=str))
        self._group = group
        self.done = 0
        """Groups that an earlier run has written, once this is entered."""
        self.failed = 0
        """Rows so far that have an `error`, an earlier run's too."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_writer(self._partial.with_name(f".{self._partial.name}.lock")))
            stack.enter_context(named_errors(self._out))
            self.done = self._resume()
            self._stream = stack.enter_context(open(self._partial, "a", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, *rest)
        with self._stack:
            self._stream.flush()
            with atomic_write(self._out, "wb") as target, open(self._partial, "rb") as source:
                source.readline()
                for line in source:
                    target.write(line)
            self._partial.unlink()
        return None

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add whole groups; they are on disk when this returns."""
        for row in rows:
            self.failed += bool(row.get("error"))
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _resume(self) -> int:
        data = self._partial.read_bytes() if self._partial.exists() else b""
        header = json.dumps(self._header).encode() + b"\n"
        if header.startswith(data):  # nothing yet, or a description cut short
            self._partial.write_bytes(header)
            return 0
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        found: Any = None
        with contextlib.suppress(ValueError, IndexError):
            found = json.loads(lines[0])
        if found != self._header:
            known = found if isinstance(found, dict) else {}
            changed = [key for key in {**self._header, **known} if known.get(key) != self._header.get(key)]
            what = ", ".join(changed)
            raise InvalidOption(f"{self._partial} is left from a run with other {what}: finish that one, or delete it")
        done = (len(lines) - 1) // self._group
        kept = sum(map(len, lines[: 1 + done * self._group]))
        if kept != len(data):
            os.truncate(self._partial, kept)
        self.failed = sum(bool(json.loads(line).get("error")) for line in lines[1 : 1 + done * self._group])
        if done:
            logger.info("resuming %s after %d prompts", self._out, done)
        return done
