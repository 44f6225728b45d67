"""What people say of answers, in a file that training reads: votes, corrections and thumbs.

A vote or a correction is a line of `prompt`, `chosen` and `rejected`; a thumb, which compares nothing, goes to a file beside,
`FILE.thumbs.jsonl`, as a line of `prompt`, `completion` and `label`, TRL's layout of unpaired preferences. Each line says when
it came and with which API key, by a digest: what comes of a loop can weigh keys, and leave one out.
"""

import datetime
import hashlib
import time
from collections import deque
from pathlib import Path
from typing import Any

from trimtab.appended import append_row
from trimtab.errors import InvalidOption
from trimtab.files import expand_home
from trimtab.serve.bodies import Feedback
from trimtab.serve.refusal import Refusal

__all__ = ["FeedbackBook", "key_name"]

HOUR = 3600.0
MOST_KEYS = 100_000
"""Whose times are remembered."""


def key_name(key: str) -> str:
    """What a line calls an API key."""
    return hashlib.sha256(f"trimtab feedback {key}".encode()).hexdigest()[:16]


class FeedbackBook:
    """Appends what people say; the event loop alone calls `admit`, any thread `append`.

    Args:
        path: a `.jsonl` file; it and its folder are made when something comes.
        per_hour: how much one key may say within an hour.

    Raises:
        InvalidOption: the path is a folder, or has another name.
    """

    def __init__(self, path: str | Path, per_hour: int) -> None:
        self.path, self._per_hour = expand_home(path), per_hour
        if self.path.suffix != ".jsonl":
            raise InvalidOption(f"--feedback {path} must end in .jsonl, which is what training reads")
        if self.path.is_dir():
            raise InvalidOption(f"--feedback {path} is a folder: name a file")
        self.thumbs = self.path.with_name(f"{self.path.stem}.thumbs.jsonl")
        """Where thumbs go."""
        self._times: dict[str, deque[float]] = {}

    def admit(self, key: str) -> None:
        """Count one more of a key.

        Raises:
            Refusal: it has said as much as it may.
        """
        now, times = time.monotonic(), self._times.setdefault(key, deque())
        while times and now - times[0] >= HOUR:
            times.popleft()
        if len(times) >= self._per_hour:
            wait = int(HOUR - (now - times[0])) + 1
            raise Refusal(429, f"one key may give feedback {self._per_hour} times an hour: wait", retry_after=wait)
        times.append(now)
        if len(self._times) > MOST_KEYS:
            self._times.pop(next(iter(self._times)))

    def append(self, said: Feedback, key: str) -> dict[str, Any]:
        """Write it; the line as it was written.

        Raises:
            InvalidRequest: it cannot be written as JSON.
            OSError: the disk is full or cannot be written; nothing of the line is left on it.
        """
        kind = "vote" if said.chosen is not None else "correction" if said.correction is not None else "thumb"
        row: dict[str, Any] = {"prompt": said.asked}
        if kind == "thumb":
            row |= {"completion": _answer(said, said.completion), "label": said.rating == "up"}
        else:
            better, worse = (said.chosen, said.rejected) if kind == "vote" else (said.correction, said.completion)
            row |= {"chosen": _answer(said, better), "rejected": _answer(said, worse)}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row |= {"feedback": kind, "key": key, "time": now} | ({} if said.model is None else {"model": said.model})
        append_row(self.thumbs if kind == "thumb" else self.path, row, "the feedback")
        return row


def _answer(said: Feedback, text: str | None) -> Any:
    """An answer of the prompt's kind."""
    return text if said.messages is None else [{"role": "assistant", "content": text}]
