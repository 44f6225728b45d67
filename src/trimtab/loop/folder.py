"""A loop's folder: its rounds, its history, and the link to the aligner in service.

    OUT/history.json       the loop's proposal and start; every verdict, every rollback; which round is in service
    OUT/rounds/003/        begun.json, what the round began with; pairs.jsonl, of drawn answers; aligner/
    OUT/current            a link to rounds/003/aligner: what servers and commands load
    OUT/index.html         the curve of rounds

What counts is `history.json`, which is written whole; the link and the page follow from it, and are mended at every call. Votes
are not kept: they stay in their files, and `begun.json` has digests of those that a round has had. While a round is under way
its folder also has the pairs that it trains on and is judged by.
"""

import contextlib
import datetime
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, InvalidOption
from trimtab.files import expand_home, only_writer, read_json, write_json

__all__ = ["LoopFolder"]

logger = logging.getLogger(__name__)

VERSION = 1
ROUNDS, CURRENT, HISTORY = "rounds", "current", "history.json"
LOCK = ".loop.lock"


class LoopFolder:
    """What a loop has come to. Inside `writing`, no other process changes it.

    Args:
        path: the folder; it need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expand_home(path)
        self.history: dict[str, Any] = {}
        """What `history.json` holds; empty before the loop begins."""

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder, read its history, and mend what a kill left between history and link.

        Raises:
            InvalidOption: another process holds it, or it is somebody else's folder.
            DataError: its history cannot be read.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InvalidOption(f"--out {self.path} is a file; name a folder")
        there = self.path / HISTORY
        if self.path.is_dir() and not there.exists() and any(item.name != LOCK for item in self.path.iterdir()):
            raise InvalidOption(f"--out {self.path} is not empty and holds no loop; name another folder")
        with only_writer(self.path / LOCK):
            if there.exists():
                self.history = read_json(there)
                if not isinstance(self.history, dict) or self.history.get("version") != VERSION:
                    raise DataError(f"{there}: is no history of a loop that this version reads")
                self._link()
                for number in range(1, self.next):
                    self.tidy(number)
            yield

    def begin(self, facts: dict[str, Any]) -> None:
        """Make it a loop, or check that it is the same one; nothing is written before the proposal is there.

        Args:
            facts: what a loop keeps from its beginning to its end.

        Raises:
            InvalidOption: it is another one.
        """
        if not self.history:
            self.history = {"version": VERSION, **facts, "current": 0, "rounds": [], "rollbacks": []}
            return
        for name, value in facts.items():
            if self.history.get(name) != value:
                kept = self.history.get(name)
                raise InvalidOption(
                    f"--out {self.path} is a loop with {name}={kept!r}, now it is {value!r}: name another folder"
                )

    def keep_proposal(self, fingerprint: str) -> None:
        """Remember which proposal the loop began with."""
        if "proposal_weights" not in self.history:
            self.history["proposal_weights"] = fingerprint
            self._write()

    @property
    def is_written(self) -> bool:
        """Whether there is a loop on disk."""
        return (self.path / HISTORY).exists()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The verdicts so far."""
        return list(self.history.get("rounds", []))

    @property
    def current(self) -> int:
        """The round whose aligner is in service; 0 for what the loop began with."""
        return int(self.history.get("current", 0))

    @property
    def next(self) -> int:
        """The number of the round that is under way, or comes."""
        return len(self.rounds) + 1

    def aligner(self, number: int) -> str | None:
        """Where a round's aligner is; None for the proposal alone."""
        return str(self.round(number) / "aligner") if number else self.history.get("aligner")

    def round(self, number: int) -> Path:
        """A round's folder."""
        return self.path / ROUNDS / f"{number:03d}"

    def begun(self, number: int) -> dict[str, Any] | None:
        """What a round began with; None if it has not."""
        path = self.round(number) / "begun.json"
        return read_json(path) if path.exists() else None

    def taken(self) -> set[str]:
        """Digests of the votes that rounds have had."""
        return {digest for number in range(1, self.next) for digest in (self.begun(number) or {}).get("votes", [])}

    def finish(self, verdict: dict[str, Any]) -> None:
        """Put a round's verdict into the history, its aligner into service if it is promoted, and away what only it needed."""
        number = int(verdict["round"])
        self.history["rounds"] = [*self.rounds, {**verdict, "time": _now()}]
        if verdict["promoted"]:
            self.history["current"] = number
        self._write()
        self.tidy(number)

    def tidy(self, number: int) -> None:
        """Remove what only a round under way needs: texts of votes, and what was drawn for their prompts; rows, checkpoints."""
        folder, begun = self.round(number), self.begun(number)
        drawn = [] if begun is None or begun["pool"] else ["pairs.jsonl", "pairs.jsonl.partial"]
        for name in ("train.jsonl", "held_out.jsonl", "data.jsonl", "prompts.jsonl", *drawn):
            (folder / name).unlink(missing_ok=True)
        for item in (folder / "aligner" / "proposal_cache", *folder.glob("aligner/checkpoint-*")):
            shutil.rmtree(item, ignore_errors=True)

    def roll_back(self, number: int) -> None:
        """Put an earlier round's aligner into service.

        Raises:
            InvalidOption: there is none.
        """
        if number > len(self.rounds):
            known = f"it has {len(self.rounds)}" if self.rounds else "it has none yet"
            raise InvalidOption(f"--rollback {number}: the loop in {self.path} has no such round; {known}")
        if self.aligner(number) is None:
            raise InvalidOption(
                "--rollback 0: this loop began with the proposal alone, which is no aligner: decode the proposal instead"
            )
        if self.begun(self.next) is not None:  # it has begun from what is rejected now
            logger.warning("round %d, which was under way, is given up; its votes are new ones again", self.next)
            shutil.rmtree(self.round(self.next))
        self.history["rollbacks"] = [*self.history["rollbacks"], {"from": self.current, "to": number, "time": _now()}]
        self.history["current"] = number
        self._write()

    def _write(self) -> None:
        write_json(self.path / HISTORY, self.history)
        self._link()

    def _link(self) -> None:
        """Let `current` lead to the aligner in service: a new link takes the place of the old one at once."""
        link, target = self.path / CURRENT, self.aligner(self.current)
        if target is None or (link.is_symlink() and os.path.realpath(link) == os.path.realpath(target)):
            return
        to = os.path.relpath(target, self.path) if self.current else os.path.realpath(target)
        if not self.current and not os.path.isdir(to):
            return  # a hub's aligner is loaded by its name
        fresh = self.path / f".{CURRENT}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(to)
        os.replace(fresh, link)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
