"""One worker process, as the process that asks it has it.

It is not one of `multiprocessing`, which would run the user's script once more in it, and would not let a function start
processes itself. It leads a session of its own: an interrupt at the terminal is left to us, and whatever a function has
started ends with it.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe

from trimtab.judges.rewards.calling import Failed, Reply
from trimtab.judges.rewards.worker_process import BROKEN, FAILED, READY, Setup

__all__ = ["Worker"]

START = 300.0
"""Seconds that a worker may take to import its function."""

GONE = 5.0
"""Seconds in which a process that is killed is gone."""

CODE = """import json, sys
sys.path[:] = json.loads(sys.argv[2])
from trimtab.judges.rewards.worker_process import serve
serve(int(sys.argv[1]))"""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Worker:
    """A worker process, started.

    Args:
        setup: the function, and the limit of a call.
        folder: where it runs.

    Attributes:
        ready: whether it has imported its function.
        job: the place of the completion that it is asked for; None if it is asked for none.
        answered: whether it has ever answered.
        lost: whether it can be asked no more.
        deadline: when it is late, by `time.monotonic`.
        connection: to it.
    """

    def __init__(self, setup: Setup, folder: str) -> None:
        self.ready = self.answered = self.lost = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START
        self._limit = setup.limit
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", CODE, str(theirs.fileno()), json.dumps([str(place) for place in sys.path])],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a function prints is no result of ours
                cwd=folder,
                env={**os.environ, **ONE_THREAD},
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # it has ended already: that is heard
            self.connection.send(setup)

    @property
    def has_ended(self) -> bool:
        """Whether there is no such process any more."""
        return self._process.poll() is not None

    def ask(self, job: int, payload: bytes) -> None:
        """Ask it for a completion; it may turn out to be lost."""
        self.job, self.deadline = job, time.monotonic() + (math.inf if self._limit is None else self._limit)
        try:
            self.connection.send_bytes(payload)
        except OSError:
            self.job, self.lost = None, True

    def hear(self) -> Reply:
        """What it says, or that it has ended, or that it cannot import its function; of one that is ready now, None."""
        try:
            if self.has_ended and not self.connection.poll():
                raise EOFError
            what, value = self.connection.recv()
        except (EOFError, OSError):
            return self._lose(f"ended its worker process{self._how()}")
        if what == BROKEN:
            return self._lose(f"in a worker process, {value}")
        if what == READY:
            self.ready, self.deadline = True, math.inf
            return None
        self.answered = True
        return Failed(value) if what == FAILED else value

    def give_up(self) -> Reply:
        """Say that it is late."""
        seconds = self._limit if self.ready else START
        return self._lose(f"took more than {seconds:g} seconds{'' if self.ready else ' to be imported'}, and was ended")

    def end(self) -> None:
        """End the process, and what it has started."""
        self.lost = True
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # an interrupt in `poll` may have left its lock taken
            self._process.wait(GONE)
        self.connection.close()

    def _lose(self, why: str) -> Failed:
        self.lost = True
        return Failed(why)

    def _how(self) -> str:
        """How it ended, for a message."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1)
            if status >= 0:
                return f" (exit status {status})"
            hint = ", as when memory runs out" if -status == signal.SIGKILL else ""
            return f" ({signal.Signals(-status).name}{hint})"
        return ""
