"""SHA-256 of large files, paid once: kept between processes beside what the system says of a file.

A digest is believed while path, device, inode, size and both times of a file are what they were. A file that was written just
before it was read is digested, but not remembered: another write within the same tick of the clock would not show (git's
"racy" entries). Where the folder cannot be written to, every process reads the file again.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from trimtab.errors import ModelError
from trimtab.files import cache_folder, write_json

__all__ = ["Seen", "digest_file"]

logger = logging.getLogger(__name__)

WORTH_KEEPING = 2**24
"""Bytes from which a digest is kept: less is read in milliseconds."""
LARGE = 2**30
"""Bytes from which reading a file takes long enough to be said."""
SETTLED = 3 * 10**9
"""Nanoseconds for which a file must have been left alone; no file system's clock is coarser."""


class Seen(NamedTuple):
    """A file as the system describes it."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    """When its contents or its description last changed: no program can set it back."""

    @classmethod
    def at(cls, path: Path) -> "Seen":
        """How a file is now; links are followed."""
        path = path.resolve()
        found = path.stat()
        return cls(str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def digest_file(seen: Seen) -> str:
    """SHA-256 of a file, in hexadecimal digits, from memory or from its bytes.

    Raises:
        ModelError: the file is not what was seen.
    """
    kept = _place(seen)
    if kept is not None and (known := _recall(kept, seen)) is not None:
        return known
    if seen.size >= LARGE:
        logger.info("reading %s once, to tell its weights from others", seen.path)
    started = time.time_ns()
    with contextlib.suppress(FileNotFoundError), open(seen.path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if Seen.at(Path(seen.path)) == seen:
            if kept is not None and started - max(seen.mtime_ns, seen.ctime_ns) > SETTLED:
                with contextlib.suppress(OSError):
                    write_json(kept, {**seen._asdict(), "sha256": digest})
            return digest
    raise ModelError(f"{seen.path} has changed since it was loaded: load the model again")


def _place(seen: Seen) -> Path | None:
    """Where the digest of a file is kept, if it is."""
    folder = cache_folder("digests")
    if seen.size < WORTH_KEEPING or folder is None:
        return None
    return folder / f"{hashlib.sha256(os.fsencode(seen.path)).hexdigest()}.json"


def _recall(kept: Path, seen: Seen) -> str | None:
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        digest = found.pop("sha256")
        intact = found == seen._asdict() and Seen.at(Path(seen.path)) == seen and len(bytes.fromhex(digest)) == 32
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, torn, or somebody else's
        return None
    return digest if intact else None
