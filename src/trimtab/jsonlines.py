"""A JSON Lines file that is written as results come, survives a kill, and appears under its name only when it is whole."""

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from trimtab.errors import InvalidOption
from trimtab.files import atomic_write
from trimtab.kept_lines import KeptLines

__all__ = ["ResumableLines", "kept_header", "write_rows"]

logger = logging.getLogger(__name__)


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a whole file, or nothing."""
    with atomic_write(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


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
        self._file = KeptLines(self._partial, called=self._out)
        self._header = json.loads(json.dumps(header, default=str))
        self._group = group
        self.done = 0
        """Groups that an earlier run has written, once this is entered."""
        self.failed = 0
        """Rows so far that have an `error`, an earlier run's too."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._file)
            self.done = self._resume()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, *rest)
        with self._stack:
            with atomic_write(self._out, "wb") as target, open(self._partial, "rb") as source:
                source.readline()
                for line in source:
                    target.write(line)
            self._partial.unlink()
        return None

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add whole groups; they are on disk when this returns."""
        rows = list(rows)
        self._file.append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.failed += sum(bool(row.get("error")) for row in rows)

    def _resume(self) -> int:
        lines, torn = self._file.lines, self._file.torn
        header = json.dumps(self._header) + "\n"
        if not lines and header.encode().startswith(torn):  # nothing yet, or a description cut short
            self._file.keep(0)
            self._file.append(header)
            return 0
        found: Any = None
        with contextlib.suppress(ValueError, IndexError):
            found = json.loads(lines[0])
        if found != self._header:
            known = found if isinstance(found, dict) else {}
            changed = [key for key in {**self._header, **known} if known.get(key) != self._header.get(key)]
            what = ", ".join(changed)
            raise InvalidOption(f"{self._partial} is left from a run with other {what}: finish that one, or delete it")
        done = (len(lines) - 1) // self._group
        kept = 1 + done * self._group
        self.failed = sum(bool(json.loads(line).get("error")) for line in lines[1:kept])
        self._file.keep(kept)
        if done:
            logger.info("resuming %s after %d prompts", self._out, done)
        return done
