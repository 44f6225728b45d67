"""What a server keeps of its users: of each pair of answers how many nats apart they are to each aligner, and when it came.

No text is kept, and no weight: weights are fitted anew from the numbers. A user is a file, so deleting one is deleting a file.
Its name is a digest; the user's own name stands in it. Numbers are of certain aligners under a certain rule: `bank` says which,
and where it is another one, earlier pairs mean nothing any more and go.
"""

import datetime
import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import DataError, InvalidRequest, TrimtabError
from trimtab.files import only_writer, write_json

__all__ = ["Kept", "NoSuchUser", "UserStore"]

logger = logging.getLogger(__name__)

LONGEST_NAME = 256
"""Characters of a user's name."""


class NoSuchUser(TrimtabError):
    """Nothing is kept of a user of that name."""


class Kept(NamedTuple):
    """A pair of answers."""

    nats: list[float]
    """By how much more each aligner of the bank favours the preferred one."""
    time: str
    """When it came, in UTC: `2026-11-30T23:59:59+00:00`."""


class UserStore:
    """Users in a folder, until `close`; one process at a time has it. Any thread may call its methods.

    Args:
        folder: it need not be there yet.
        bank: what tells aligners and rule from others; numbers of another bank are dropped.
        aligners: K.
        max_users: how many there may be.
        max_pairs: how many pairs are kept of each, the newest ones.
        days: how long a pair is kept; None for as long as the user.
        now: the clock.

    Raises:
        InvalidOption: another process has the folder.
    """

    def __init__(
        self,
        folder: Path,
        bank: str,
        aligners: int,
        *,
        max_users: int,
        max_pairs: int,
        days: float | None = None,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._folder, self._bank, self._aligners = folder, bank, aligners
        self._max_users, self._max_pairs, self._days, self._now = max_users, max_pairs, days, now
        self._lock, self._stack = threading.Lock(), ExitStack()
        self._stack.enter_context(only_writer(folder / ".lock"))

    def close(self) -> None:
        """Let go of the folder."""
        self._stack.close()

    def features(self, user: str) -> Tensor:
        """F `[N, K]` of a user's pairs in float64, in the order they came.

        Raises:
            NoSuchUser: nothing is kept of this bank.
            DataError: somebody has changed the file.
        """
        with self._lock:
            kept = self._read(user)
        if not kept:
            raise NoSuchUser(f"nothing is known of a user '{user[:128]}'")
        return torch.tensor([pair.nats for pair in kept], dtype=torch.float64)

    def add(self, user: str, nats: Sequence[float]) -> Tensor:
        """Keep one more pair of a user; what `features` gives then.

        Raises:
            InvalidRequest: there are as many users as there may be, or the name is empty or too long.
            OSError: the disk is full or cannot be written; nothing has changed then.
        """
        with self._lock:
            path, kept = self._path(user), self._read(user)
            if not path.exists() and sum(1 for _ in self._folder.glob("*.json")) >= self._max_users:
                raise InvalidRequest(f"user: this server keeps {self._max_users} users, and there are as many: delete one")
            pair = Kept(list(nats), self._now().isoformat(timespec="seconds"))
            kept = [*kept, pair][-self._max_pairs :]
            write_json(path, {"user": user, "bank": self._bank, "pairs": [pair._asdict() for pair in kept]})
        return torch.tensor([pair.nats for pair in kept], dtype=torch.float64)

    def delete(self, user: str) -> None:
        """Forget a user.

        Raises:
            NoSuchUser: nothing is kept.
        """
        with self._lock:
            path = self._path(user)
            if not path.exists():
                raise NoSuchUser(f"nothing is known of a user '{user[:128]}'")
            path.unlink()

    def _path(self, user: str) -> Path:
        if not 0 < len(user) <= LONGEST_NAME:
            raise InvalidRequest(f"user must have 1 to {LONGEST_NAME} characters, not {len(user)}")
        return self._folder / f"{hashlib.sha256(user.encode(errors='surrogatepass')).hexdigest()[:32]}.json"

    def _read(self, user: str) -> list[Kept]:
        """A user's pairs of this bank that are not too old."""
        path = self._path(user)
        if not path.exists():
            return []
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            pairs = [Kept(**pair) for pair in found["pairs"]]
            times = [datetime.datetime.fromisoformat(pair.time) for pair in pairs]
            if found["bank"] != self._bank:
                logger.warning("%d pairs of a user are of other aligners, or of another rule: left out", len(pairs))
                return []
            if any(not _are_numbers(pair.nats, self._aligners) for pair in pairs):
                raise ValueError(f"a pair without {self._aligners} finite numbers")
            oldest = None if self._days is None else self._now() - datetime.timedelta(days=self._days)
            return [pair for pair, time in zip(pairs, times, strict=True) if oldest is None or time >= oldest]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not as it was written ({error}): delete it") from error


def _are_numbers(nats: Any, count: int) -> bool:
    return isinstance(nats, list) and len(nats) == count and all(isinstance(x, float) and math.isfinite(x) for x in nats)
