"""A reward function that other processes call, for one completion at a time.

Several processes do so at once, with a limit of time for each call. What hangs, crashes or eats all memory then ends a process
of those, and not the run. A function that compares completions with each other belongs where `FunctionReward` calls it, with
all of them at once.
"""

import math
import pickle

from trimtab.errors import InvalidOption, ModelError
from trimtab.judges.base import Asked
from trimtab.judges.rewards.calling import Arguments, Failed, Replies, only
from trimtab.judges.rewards.function import FunctionReward
from trimtab.judges.rewards.importing import find_function
from trimtab.judges.rewards.pool import Pool
from trimtab.judges.rewards.worker_process import Setup
from trimtab.options import Range

__all__ = ["TIMEOUT", "WORKERS", "WorkerReward"]

WORKERS, TIMEOUT = Range(low=1), Range(above=0, below=math.inf)
"""Which numbers of processes and of seconds there may be."""


class WorkerReward(FunctionReward):
    """What a function says in worker processes. They end with `close`, with this object, and with the interpreter.

    Args:
        text: `MODULE.py:FUNCTION` or `package.module:FUNCTION`; each process imports it, and so does this one.
        workers: how many processes.
        timeout: seconds for one completion, after which its process is ended and another one started; None for no limit.
        on_error: see `FunctionReward`; a completion that takes too long or ends its process is one that the function fails for.

    Raises:
        InvalidOption: there is no such function, it cannot be called without what only a trainer has, or a number is out of
            its range.
    """

    def __init__(self, text: str, *, workers: int = 1, timeout: float | None = None, on_error: str = "stop") -> None:
        for name, value, allowed in (("workers", workers, WORKERS), ("timeout", timeout, TIMEOUT)):
            if value is not None and not allowed.holds(value):
                raise InvalidOption(f"{name} must be {allowed}, not {value!r}")
        found = find_function(text)
        super().__init__(*found, on_error=on_error)
        self._pool = Pool(Setup(text, found.fingerprint, timeout), workers)

    def load(self, asked: Asked, date: str) -> None:
        """Start the processes.

        Raises:
            ModelError: one of them cannot import the function.
        """
        try:
            self._pool.start()
        except Failed as failed:
            raise ModelError(f"{self._called}: {failed}") from None

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def _replies(self, arguments: Arguments, count: int) -> Replies:
        try:
            yield from self._pool.ask(count, lambda i: self._pickled(only(arguments, i)))
        except Failed as failed:
            raise ModelError(f"{self._called}: {failed}") from None

    def _pickled(self, arguments: Arguments) -> bytes:
        """The arguments as a process is sent them.

        Raises:
            ModelError: naming the column that cannot be sent.
        """
        try:
            return pickle.dumps(arguments)
        except Exception:  # whatever somebody's class raises
            for name, values in arguments.items():
                try:
                    pickle.dumps(values)
                except Exception as error:
                    raise ModelError(
                        f"{self._called}: the column '{name}' cannot be sent to a worker process: {type(error).__name__}:"
                        f" {error}; call the function in this process, without a time limit"
                    ) from error
            raise
