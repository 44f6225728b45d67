"""What a server keeps of its users: of each pair of answers how many nats apart they are to each aligner, and when it came.

No answer is kept, and no weight: weights are fitted anew from the numbers. A user is a file, so deleting one is deleting a
file. Its name is a digest; the user's own name stands in it. Numbers are of certain aligners under a certain rule: `bank` says
which, and where it is another one, earlier pairs mean nothing any more, and go with the next one.
"""

import contextlib
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
from trimtab.files import only_writer, remove_leftovers, write_json

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
        max_users: how many there may be.
        max_pairs: how many pairs are kept of each, the newest ones.
        days: how long a pair is kept; None for as long as the user.
        now: the clock.

    Raises:
        InvalidOption: another process has the folder.
        OSError: nothing can be written there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_users: int,
        max_pairs: int,
        days: float | None = None,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._folder, self._now = folder, now
        self._max_users, self._max_pairs, self._days = max_users, max_pairs, days
        self._lock, self._stack = threading.Lock(), ExitStack()
        self._stack.enter_context(only_writer(folder / ".lock"))
        remove_leftovers(folder)  # a kill in the middle of a write leaves what nobody would delete
        self.sweep()

    def close(self) -> None:
        """Let go of the folder."""
        self._stack.close()

    def knows(self, user: str) -> bool:
        """Whether anything is kept of a user, of whatever bank."""
        with contextlib.suppress(InvalidRequest):
            return self._path(user).exists()
        return False

    def features(self, user: str, bank: str, aligners: int) -> Tensor:
        """F `[N, K]` of a user's pairs in float64, in the order they came.

        Args:
            user: their name.
            bank: what tells aligners and rule from others.
            aligners: K.

        Raises:
            NoSuchUser: nothing is kept of this bank.
            DataError: somebody has changed the file.
        """
        with self._lock:
            kept = self._read(user, bank, aligners)
        if not kept:
            raise NoSuchUser(f"nothing is known of a user '{user[:128]}'")
        return torch.tensor([pair.nats for pair in kept], dtype=torch.float64)

    def add(self, user: str, bank: str, nats: Sequence[float]) -> Tensor:
        """Keep one more pair of a user; what `features` gives then. Pairs of another bank go.

        Raises:
            InvalidRequest: there are as many users as there may be, or the name is empty, too long, or no Unicode.
            OSError: the disk is full or cannot be written; nothing has changed then.
        """
        with self._lock:
            path, kept = self._path(user), self._read(user, bank, len(nats))
            if not path.exists() and len(self._files()) >= self._max_users:
                raise InvalidRequest(f"user: this server keeps {self._max_users} users, and there are as many: delete one")
            pair = Kept(list(nats), self._now().isoformat(timespec="seconds"))
            kept = [*kept, pair][-self._max_pairs :]
            self._write(path, user, bank, kept)
        return torch.tensor([pair.nats for pair in kept], dtype=torch.float64)

    def delete(self, user: str) -> None:
        """Forget a user, whatever bank the pairs are of.

        Raises:
            NoSuchUser: nothing is kept.
        """
        with self._lock:
            path = self._path(user)
            if not path.exists():
                raise NoSuchUser(f"nothing is known of a user '{user[:128]}'")
            path.unlink()

    def sweep(self) -> None:
        """Take what is too old from the disk."""
        if self._days is None:
            return
        with self._lock:
            for path in self._files():
                with contextlib.suppress(DataError):  # it is said where it is asked for
                    found, kept = self._load(path)
                    fresh = [pair for pair in kept if self._is_fresh(pair)]
                    if not fresh:
                        path.unlink()
                    elif len(fresh) < len(kept):
                        self._write(path, found["user"], found["bank"], fresh)

    def _files(self) -> list[Path]:
        return list(self._folder.glob("*.json"))

    def _path(self, user: str) -> Path:
        if not 0 < len(user) <= LONGEST_NAME:
            raise InvalidRequest(f"user must have 1 to {LONGEST_NAME} characters, not {len(user)}")
        if "\N{REPLACEMENT CHARACTER}" in user:
            raise InvalidRequest("user is no valid Unicode")
        return self._folder / f"{hashlib.sha256(user.encode(errors='surrogatepass')).hexdigest()[:32]}.json"

    def _read(self, user: str, bank: str, aligners: int) -> list[Kept]:
        """A user's pairs of a bank that are not too old."""
        path = self._path(user)
        if not path.exists():
            return []
        found, kept = self._load(path)
        if found["bank"] != bank:
            logger.warning("%d pairs of a user are of other aligners, or of another rule: left out", len(kept))
            return []
        if any(len(pair.nats) != aligners for pair in kept):
            raise DataError(f"{path} is not as it was written (a pair without {aligners} numbers): delete it")
        return [pair for pair in kept if self._is_fresh(pair)][-self._max_pairs :]

    def _load(self, path: Path) -> tuple[dict[str, Any], list[Kept]]:
        """What a file has.

        Raises:
            DataError: somebody has changed it.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            kept = [Kept(**pair) for pair in found["pairs"]]
            for pair in kept:
                datetime.datetime.fromisoformat(pair.time)
                if not isinstance(pair.nats, list) or not all(isinstance(x, float) and math.isfinite(x) for x in pair.nats):
                    raise ValueError("a pair without finite numbers")
            if not isinstance(found["bank"], str) or not isinstance(found["user"], str):
                raise ValueError("no texts where there should be")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path} is not as it was written ({error}): delete it") from error
        return found, kept

    def _write(self, path: Path, user: str, bank: str, kept: Sequence[Kept]) -> None:
        write_json(path, {"user": user, "bank": bank, "pairs": [pair._asdict() for pair in kept]})

    def _is_fresh(self, pair: Kept) -> bool:
        if self._days is None:
            return True
        return datetime.datetime.fromisoformat(pair.time) >= self._now() - datetime.timedelta(days=self._days)
