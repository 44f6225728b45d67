"""Worker processes that call one function: each has one completion at a time, and one that is late or dies is replaced."""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

from trimtab.judges.rewards.calling import Failed, Replies, Reply
from trimtab.judges.rewards.worker import Worker
from trimtab.judges.rewards.worker_process import Setup

__all__ = ["Pool"]

TICK = 1.0
"""Seconds between looks at whether a process is there: its connection does not tell if one that it started holds it, too."""


class Pool:
    """Worker processes for one function. They end with this object, with `close`, and with the interpreter.

    Args:
        setup: the function, and the limit of a call.
        size: how many.
    """

    def __init__(self, setup: Setup, size: int) -> None:
        self._setup, self._size = setup, size
        self._folder = os.getcwd()  # where a relative path to the function leads, whatever the folder is later
        self._workers: list[Worker] = []
        weakref.finalize(self, _end, self._workers, os.getpid())

    def start(self) -> None:
        """Start those that are not there, and wait until all can be asked.

        Raises:
            Failed: they cannot be started.
        """
        self._fill(self._size)
        while any(not worker.ready for worker in self._workers):
            self._news()

    def ask(self, count: int, payload: Callable[[int], bytes]) -> Replies:
        """Ask for so many completions; those that are still asked for when this generator is closed are given up.

        Args:
            count: of completions.
            payload: the pickled arguments of the completion at a place.

        Raises:
            Failed: no worker can be started.
        """
        waiting = deque(range(count))
        try:
            while waiting or self._busy():
                self._fill(min(self._size, len(waiting) + len(self._busy())))
                for worker in self._workers:
                    if waiting and worker.ready and worker.job is None:
                        worker.ask(waiting[0], payload(waiting[0]))
                        if not worker.lost:
                            waiting.popleft()
                self._bury()
                yield from self._news()
        finally:
            self._drop(self._busy())

    def close(self) -> None:
        """End all processes. The next call starts others."""
        self._drop(list(self._workers))

    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.job is not None]

    def _fill(self, size: int) -> None:
        while len(self._workers) < size:
            self._workers.append(Worker(self._setup, self._folder))

    def _bury(self) -> None:
        """Let go of those that have ended while nobody asked them: where memory runs out, they may go first."""
        dead = [worker for worker in self._workers if worker.ready and worker.job is None and (worker.lost or worker.has_ended)]
        self._drop(dead)
        if any(not worker.answered for worker in dead):
            raise Failed("its worker process ended before it was asked for anything")

    def _news(self) -> list[tuple[int, Reply]]:
        """Wait a tick, or until a worker says something, ends or is late; what comes of their jobs.

        Raises:
            Failed: one of them cannot be started.
        """
        awaited = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        if not awaited:
            return []
        seconds = min(worker.deadline for worker in awaited) - time.monotonic()
        speaking = wait([worker.connection for worker in awaited], max(0.0, min(TICK, seconds)))
        replies = []
        for worker in awaited:
            if worker.connection in speaking or worker.has_ended:
                reply = worker.hear()
            elif time.monotonic() >= worker.deadline:
                reply = worker.give_up()
            else:
                continue
            if worker.lost:
                self._drop([worker])
            if worker.job is not None:
                replies.append((worker.job, reply))
                worker.job = None
            elif isinstance(reply, Failed):
                raise reply
        return replies

    def _drop(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.end()
            self._workers.remove(worker)


def _end(workers: Sequence[Worker], owner: int) -> None:
    """End processes, unless this one is a copy of the one that started them."""
    if os.getpid() == owner:
        for worker in workers:
            worker.end()
