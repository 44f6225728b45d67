"""The engine in a thread of its own, and its results in the event loop.

The event loop never waits for the engine, and the engine never for the event loop: commands go one way through a queue, what
happened goes back in one call. A `Job` is one HTTP request: it may hold several prompts and several completions of each.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from typing import Any

import torch

from trimtab.decode.engine import Engine
from trimtab.decode.request import TokenEvent
from trimtab.decode.sequence import Sequence as Growing
from trimtab.errors import TrimtabError

__all__ = ["EngineFailed", "Job", "Stopped", "Worker"]

logger = logging.getLogger(__name__)

ENGINE_FAILED = "the engine failed; the server's log says why"
MAX_FAILURES = 3
"""Steps that fail one after another before the engine is given up."""

Scoring = Generator[None, None, Any]


class Stopped(TrimtabError):
    """The server stops, or its engine has failed for good; ask again, elsewhere or later."""


class EngineFailed(TrimtabError):
    """A step of the engine failed; the server's log says why, its clients do not learn it."""


class Job:
    """One request in the engine. Iterate over it, in the event loop that made it, for what happens, as soon as it happens.

    Args:
        sequences: what to decode; those of the i-th prompt carry the number `first + i`.
        first: the number of the first prompt.
    """

    def __init__(self, sequences: Sequence[Growing], first: int) -> None:
        self.sequences, self.first = list(sequences), first
        self.arrived = time.perf_counter()
        self.deadline: asyncio.TimerHandle | None = None
        """Ends it if it takes too long; None before it is submitted."""
        self.first_token: float | None = None
        """When its first token came, on the clock of `arrived`."""
        self.begun = False
        """Whether the engine has produced anything for it; the engine's thread alone looks at it."""
        self._left = len(self.sequences)
        self._events: list[TokenEvent] = []
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    @property
    def readers(self) -> list[Growing]:
        """The first completion of each prompt."""
        return list({s.prompt_index: s for s in reversed(self.sequences)}.values())

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._error is not None or self._left == 0

    def deliver(self, events: Sequence[TokenEvent], error: Exception | None = None) -> None:
        """Take what happened; called in the event loop."""
        if self._error is None:
            self._events += events
            self._left -= sum(event.finish_reason is not None for event in events)
            self._error = error
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        """What has happened since last time, as soon as there is something.

        Raises:
            TrimtabError: what ended the job before its sequences.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            events, self._events = self._events, []
            if events:
                yield events
            if self._error is not None and not self._events:
                raise self._error
            if self._left == 0 and not self._events:
                return


class Worker:
    """Runs an engine, and scores prompts between its steps.

    Args:
        engine: it belongs to the worker's thread from `start` on.
        loop: where results are delivered.
        interval: seconds between two deliveries at the least, so that a fast model does not spend its time on sending token
            by token. The first token of a job and its last are never held back.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, interval: float = 0.0) -> None:
        self.engine = engine
        self._interval, self._delivered = interval, 0.0
        self._held: dict[Job, list[TokenEvent]] = {}
        """What happened since the last delivery."""
        self.failure: BaseException | None = None
        """Why the engine was given up."""
        self._loop = loop
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._numbered = 0
        self._jobs: dict[int, Job] = {}
        """By the number of each prompt; touched by the worker's thread alone."""
        self._scorings: list[tuple[Scoring, asyncio.Future[Any]]] = []
        self._closed = False
        """Whether the thread has done its work; the engine is left alone then."""
        self._outstanding = 0
        """Sequences and scorings that are not over; touched by the event loop alone."""
        self._thread = threading.Thread(target=self._run, name="trimtab-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def outstanding(self) -> int:
        """Sequences and scorings that are waiting or running."""
        return self._outstanding

    def reserve(self, prompts: int) -> int:
        """The first of so many consecutive numbers for prompts."""
        first, self._numbered = self._numbered, self._numbered + prompts
        return first

    def submit(self, job: Job) -> None:
        """Queue a job's sequences.

        Raises:
            Stopped: there is no engine any more.
        """
        if self.failure is not None:
            raise Stopped("the engine has failed; see the server's log")
        self._outstanding += len(job.sequences)
        self._commands.put(lambda: self._submit(job))

    def cancel(self, job: Job, error: Exception | None = None) -> None:
        """Stop a job's work at the engine's next step, if any is left; whoever follows it gets the error."""
        if not job.done:
            self._settle_job(job, [], error or Stopped("cancelled"))
            self._commands.put(lambda: self._cancel(job))

    async def score(self, scoring: Scoring) -> Any:
        """Run a scoring (`trimtab.decode.scoring.score_in_steps`), one piece between steps of the engine; what it returns."""
        if self.failure is not None:
            raise Stopped("the engine has failed; see the server's log")
        future = self._loop.create_future()
        self._outstanding += 1
        try:
            self._commands.put(lambda: self._scorings.append((scoring, future)))
            return await future
        finally:
            self._outstanding -= 1

    def abandon(self) -> None:
        """Tell all unfinished jobs that the server stops."""
        self._commands.put(self._abandon)

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread; unfinished jobs are told."""
        self._commands.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            logger.exception("the engine's thread failed")
            self.failure = error
        self._closed = True
        while not self._commands.empty():  # who was submitted too late to be seen must not wait for ever
            command = self._commands.get()
            if command is not None:
                command()
        self._abandon()

    def _work(self) -> None:
        failures = 0
        while True:
            try:
                if not self._obey():
                    break
                self._score()
                if not self.engine:
                    continue
                self._report(self.engine.step())
                if lost := self.engine.failed:  # newcomers for whom there was no room after all
                    self._fail(lost, lost[0].error or EngineFailed(ENGINE_FAILED))
                failures = 0
            except Exception as error:  # memory, mostly: who was at work is told, and the rest goes on
                failures += 1
                logger.exception("a step of the engine failed")
                self._fail(self.engine.failed, error)
                if failures >= MAX_FAILURES:
                    self.failure = error
                    break

    def _abandon(self) -> None:
        error = Stopped("the server is shutting down") if self.failure is None else EngineFailed(ENGINE_FAILED)
        self._fail(self._everyone, error)
        for _, future in self._scorings:
            self._settle(future, None, error)
        self._scorings = []

    @property
    def _everyone(self) -> list[Growing]:
        return [s for job in set(self._jobs.values()) for s in job.sequences]

    def _obey(self) -> bool:
        """Carry out all commands, waiting for one if there is nothing else to do; False to stop."""
        wait = not self.engine and not self._scorings
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        return True

    def _submit(self, job: Job) -> None:
        self._jobs |= {sequence.prompt_index: job for sequence in job.sequences}
        if self._closed:
            return
        try:
            self.engine.submit(job.sequences)
        except TrimtabError as error:
            self._fail(job.sequences, error)

    def _cancel(self, job: Job) -> None:
        self._deliver()
        self._forget([job])
        self._drop([job])

    @torch.inference_mode()
    def _score(self) -> None:
        """One piece of the scoring that came first; the others have not begun, so only its cache is in memory."""
        if not self._scorings:
            return
        scoring, future = self._scorings[0]
        try:
            if not future.cancelled():
                next(scoring)
                return
        except StopIteration as done:
            self._settle(future, done.value, None)
        except Exception as error:
            if not isinstance(error, TrimtabError):
                logger.exception("scoring a prompt failed")
            self._settle(future, None, _told(error))
        self._scorings.pop(0)

    def _report(self, events: Sequence[TokenEvent]) -> None:
        """Hand a step's events to the jobs they belong to."""
        due = time.perf_counter() - self._delivered >= self._interval
        for event in events:
            job = self._jobs.get(event.prompt_index)
            if job is None:
                continue
            self._held.setdefault(job, []).append(event)
            due = due or event.finish_reason is not None or not job.begun
            job.begun = True
        self._forget([job for job in self._held if all(s.finish_reason for s in job.sequences)])
        if due:
            self._deliver()

    def _deliver(self) -> None:
        held, self._held = self._held, {}
        self._delivered = time.perf_counter()
        if held:
            self._call(lambda: self._settle_jobs(held, None))

    def _fail(self, sequences: Sequence[Growing], error: Exception) -> None:
        """Tell the jobs of these sequences, and then drop what is left of them."""
        self._deliver()
        jobs = list(dict.fromkeys(self._jobs[s.prompt_index] for s in sequences if s.prompt_index in self._jobs))
        self._forget(jobs)
        if jobs:
            self._call(lambda: self._settle_jobs({job: [] for job in jobs}, _told(error)))
        self._drop(jobs)

    def _drop(self, jobs: Sequence[Job]) -> None:
        """Take what is left of jobs out of the engine."""
        left = [s for job in jobs for s in job.sequences if not s.finish_reason]
        if left and not self._closed:
            self.engine.cancel(left)

    def _forget(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for sequence in job.sequences:
                self._jobs.pop(sequence.prompt_index, None)

    def _settle_jobs(self, jobs: Mapping[Job, Sequence[TokenEvent]], error: Exception | None) -> None:
        for job, events in jobs.items():
            self._settle_job(job, events, error)

    def _settle_job(self, job: Job, events: Sequence[TokenEvent], error: Exception | None) -> None:
        """In the event loop: deliver, and count what is over."""
        if job.done:
            return
        if events and job.first_token is None:
            job.first_token = time.perf_counter()
        before = job._left
        job.deliver(events, error)
        self._outstanding -= before if error is not None else before - job._left

    def _settle(self, future: "asyncio.Future[Any]", value: Any, error: Exception | None) -> None:
        def settle() -> None:
            if not future.done():
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)

        self._call(settle)

    def _call(self, action: Callable[[], object]) -> None:
        """Run something in the event loop, unless that is over."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)


def _told(error: Exception) -> Exception:
    """What clients learn of an error: ours are meant for them, others are not."""
    return error if isinstance(error, TrimtabError) else EngineFailed(ENGINE_FAILED)
