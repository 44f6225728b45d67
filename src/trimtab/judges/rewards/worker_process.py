"""What a worker process runs: it imports one function, and answers for one completion after another.

It imports no torch. The function is called on the main thread, where signals work; another thread reads what is asked, and
ends the process and all that it has started once there is nobody to answer, even in the middle of a call.

Messages are pickles. The first one to come is a `Setup`; then, each way, `(READY, None)` or `(BROKEN, why)` goes out, and for
every mapping of arguments that comes in `(SCORE, number or None)` or `(FAILED, why)`.
"""

import faulthandler
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from trimtab.errors import InvalidOption
from trimtab.judges.rewards.calling import Failed, Reply, ask_alone
from trimtab.judges.rewards.importing import find_function

__all__ = ["BROKEN", "FAILED", "READY", "SCORE", "Setup", "serve"]

READY, BROKEN, SCORE, FAILED = "ready", "broken", "score", "failed"

GRACE = 5.0
"""Seconds after the limit of a call when a worker ends itself, should nobody have ended it."""


class Setup(NamedTuple):
    """What a worker is for."""

    function: str
    """`MODULE.py:FUNCTION` or `package.module:FUNCTION`."""
    fingerprint: str | None
    """What it must be; None for anything."""
    limit: float | None
    """Seconds of a call."""


def serve(descriptor: int) -> None:
    """Answer on a connection until it is closed.

    Args:
        descriptor: of this process's end of a duplex `multiprocessing.Pipe`.
    """
    os.set_inheritable(descriptor, False)
    connection: Connection[Any, Any] = Connection(descriptor)
    setup = connection.recv()
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    try:
        found = find_function(setup.function)
        if found.fingerprint != setup.fingerprint is not None:
            raise InvalidOption(f"{setup.function} is another one than when the run began: its file has changed")
    except BaseException as error:  # whatever somebody's module raises
        connection.send((BROKEN, str(error) or type(error).__name__))
        return
    connection.send((READY, None))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        while True:
            asked = inbox.get()
            if setup.limit is not None:  # a call that holds the interpreter's lock keeps the listener from ending it
                faulthandler.dump_traceback_later(setup.limit + GRACE, exit=True, file=nowhere)
            reply = _answer(found.function, asked)
            faulthandler.cancel_dump_traceback_later()
            connection.send((FAILED, str(reply)) if isinstance(reply, Failed) else (SCORE, reply))


def _answer(function: Callable[..., Any], asked: bytes) -> Reply:
    try:
        arguments = pickle.loads(asked)
    except Exception as error:  # a class that only the other process has
        return Failed(f"a worker process cannot read what the data have: {type(error).__name__}: {error}")
    return ask_alone(function, arguments)


def _listen(connection: "Connection[Any, Any]", inbox: "queue.SimpleQueue[bytes]") -> None:
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os.killpg(os.getpgrp(), signal.SIGKILL)  # this process leads a group of its own
