"""What the routes share: the server's state, its limits, and the way from a request to a job in the engine."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.engine import Engine
from trimtab.decode.request import SamplingParams, TokenEvent
from trimtab.errors import DeadRow, InvalidOption, InvalidRequest, TrimtabError
from trimtab.models.huggingface import describe_kernels
from trimtab.origins import Origins
from trimtab.serve.metrics import Metrics
from trimtab.serve.refusal import Refusal
from trimtab.serve.registry import NoSuchAligner, Registry
from trimtab.serve.rewriting import RewriteDesk
from trimtab.serve.wire import TokenTexts
from trimtab.serve.worker import EngineFailed, Job, Stopped, Worker
from trimtab.users.settings import UserSettings

__all__ = ["Opened", "Service", "Settings", "Target"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONG_PROMPT = 20_000
"""Characters from which a prompt is tokenized outside of the event loop."""
LISTED = "/v1/models lists what there is"
UNSAID_TOKENS = 4096
"""The most tokens of a completion whose request does not say and whose server has no limit."""


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        name: what the proposal is called.
        aliases: other names for it.
        api_keys: bearer tokens; none leaves the server open.
        origins: which web pages may use it.
        max_body_bytes: the longest request body.
        max_prompt_tokens: the longest prompt; None for what fits the context.
        max_tokens: the longest completion; None for what fits the context.
        max_waiting: sequences that may wait for a slot; further requests are refused with 429.
        request_timeout: seconds a request may take.
        stream_interval: seconds between two chunks of a stream at the least, but for its first and its last.
        shutdown_timeout: seconds that running requests get to finish when the server stops.
        log_prompts: write prompts and completions to the log.
        allow_loading: whether clients may load and unload aligners.
        users: what is kept of users, by which requests find their weights; None for nothing.
        feedback: where votes, corrections and thumbs go; None takes none.
        feedback_per_hour: how many of one API key.
    """

    name: str
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    origins: Origins = field(default_factory=Origins)
    max_body_bytes: int = 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_waiting: int = 256
    request_timeout: float = 600.0
    stream_interval: float = 0.02
    shutdown_timeout: float = 30.0
    log_prompts: bool = False
    allow_loading: bool = False
    users: UserSettings | None = None
    feedback: Path | None = None
    feedback_per_hour: int = 600


class Opened(NamedTuple):
    """What a server has once its models are loaded."""

    registry: Registry
    engine: Engine
    rewriting: RewriteDesk = RewriteDesk(None)
    """Where answers are rewritten."""


class Target(NamedTuple):
    """Which model a request means."""

    label: str
    """Its name in answers, logs and metrics."""
    model: AlignedModel


class Service:
    """One server's state: `loading`, then `ready`, then `stopping`; or `failed`.

    Args:
        settings: its limits.
        load: loads the models; called once, in a thread.
    """

    def __init__(self, settings: Settings, load: Callable[[], Opened]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.failure: BaseException | None = None
        self._load = load
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="trimtab-load")
        self._fetching = 0
        self._stopping = False
        self._unfinished = 0
        self._opened: Opened | None = None
        self._worker: Worker | None = None
        self.texts = TokenTexts(None)
        """How this vocabulary's tokens are written."""

    @property
    def state(self) -> str:
        """What `/health` says."""
        if self.failure is not None or (self._worker is not None and self._worker.failure is not None):
            return "failed"
        if self._stopping:
            return "stopping"
        return "loading" if self._worker is None else "ready"

    @property
    def registry(self) -> Registry:
        """The aligners.

        Raises:
            Refusal: nothing is loaded yet, or any more.
        """
        self._check_ready()
        assert self._opened is not None
        return self._opened.registry

    @property
    def worker(self) -> Worker:
        """The engine's thread.

        Raises:
            Refusal: as for `registry`.
        """
        self._check_ready()
        assert self._worker is not None
        return self._worker

    async def open(self) -> None:
        """Load the models and start the engine.

        Raises:
            TrimtabError: something cannot be loaded; the state is `failed` then.
        """
        try:
            opened = await self.load(self._load)
        except BaseException as error:
            self.failure = error
            raise
        self._opened = opened
        logger.info("the proposal's kernels: %s", describe_kernels(opened.registry.base.proposal))
        self.texts = TokenTexts(opened.registry.base.tokenizer)
        worker = Worker(opened.engine, asyncio.get_running_loop(), self.settings.stream_interval)
        worker.start()
        self._worker = worker
        self.metrics.watch(worker, opened.registry)

    def drain(self) -> None:
        """Take no further requests."""
        self._stopping = True

    def abandon(self) -> None:
        """Tell all running requests that they cannot be finished."""
        if self._worker is not None:
            self._unfinished = self._worker.outstanding
            self._worker.abandon()

    async def close(self) -> None:
        """Stop the engine."""
        self._stopping = True
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop)

    def report(self) -> dict[str, Any]:
        """What a server says when it stops."""
        return {"model": self.settings.name, "requests": self.metrics.requests, "unfinished_sequences": self._unfinished}

    async def find(self, model: str, aligner: str | Sequence[str] | None) -> Target:
        """The model that a request means by `model` and `aligner`.

        Raises:
            Refusal: there is no such model, or the two contradict each other, or it cannot be loaded now.
        """
        names = self._names(model, aligner)
        label = "+".join(names) or self.settings.name
        registry = self.registry
        try:
            found = registry.resident(names)
            if found is None:
                found = await asyncio.wait_for(self._fetch(names), self.settings.request_timeout)
        except TimeoutError:
            raise Refusal(503, f"the model '{label}' is being loaded", retry_after=5) from None
        except NoSuchAligner as error:
            param = "model" if aligner is None else "aligner"
            raise Refusal(404, f"{error}; {LISTED}", param=param, code="model_not_found") from None
        except TrimtabError as error:
            logger.warning("aligner %s cannot be brought back: %s", label, error)
            message = f"the model '{label}' cannot be loaded now; the server's log says why"
            raise Refusal(503, message, retry_after=5) from None
        return Target(label, found)

    async def _fetch(self, names: tuple[str, ...]) -> AlignedModel:
        """Bring evicted aligners back, in a thread that does nothing else; who waits for them counts as waiting."""
        self._check_room(1)
        self._fetching += 1
        try:
            return await self.load(self.registry.fetch, names)
        finally:
            self._fetching -= 1

    async def load(self, work: Callable[..., T], *args: Any, **settings: Any) -> T:
        """Do something that loads weights; one at a time, outside of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._loader, functools.partial(work, *args, **settings))

    @property
    def rewriting(self) -> RewriteDesk:
        """Where answers are rewritten."""
        return RewriteDesk(None) if self._opened is None else self._opened.rewriting

    def plain_name(self, model: str) -> str:
        """The name under which a model is listed: without `BASE:` before an aligner's, and the base's own for its others."""
        bases = (self.settings.name, *self.settings.aliases)
        if model in bases:
            return self.settings.name
        return next((model.removeprefix(f"{base}:") for base in bases if model.startswith(f"{base}:")), model)

    def _names(self, model: str, aligner: str | Sequence[str] | None) -> tuple[str, ...]:
        wanted = () if aligner is None else (aligner,) if isinstance(aligner, str) else tuple(aligner)
        own = self.plain_name(model)
        if own == self.settings.name:
            return wanted
        if own not in [entry.name for entry in self.registry.entries]:
            raise Refusal(404, f"there is no model '{own[:128]}'; {LISTED}", param="model", code="model_not_found")
        if wanted not in ((), (own,)):
            raise Refusal(400, f"aligner and model name different aligners: use model '{self.settings.name}'", param="aligner")
        return (own,)

    async def prepare(self, target: Target, prompts: Sequence[Prompt], params: SamplingParams, name: str, *, size: int) -> Job:
        """A job for these prompts; it is not in the engine yet.

        Args:
            target: the model.
            prompts: all of one request.
            params: what is asked for.
            name: the field that prompts come from, for errors.
            size: length of the request's body in bytes.

        Raises:
            Refusal: a prompt or parameter cannot be decoded, or there is no room.
        """
        self._check_room(len(prompts) * params.n)
        first = self.worker.reserve(len(prompts))

        def encode() -> Job:
            names = [name if len(prompts) == 1 else f"{name}[{i}]" for i in range(len(prompts))]
            groups = [target.model.prepare(p, params, first + i, names[i]) for i, p in enumerate(prompts)]
            return Job([sequence for group in groups for sequence in group], first)

        with self.refusing(name):
            job = await asyncio.to_thread(encode) if size > LONG_PROMPT else encode()
        longest, most = max(len(s.prompt) for s in job.sequences), self.settings.max_prompt_tokens
        if most is not None and longest > most:
            raise Refusal(400, f"{name} has {longest} tokens, but this server takes {most}: shorten it", param=name)
        return job

    def limit(self, target: Target, asked: int | None, name: str, unsaid: int = UNSAID_TOKENS) -> int:
        """The most tokens to generate: what is asked for in the field `name`, or what a request gets that does not say.

        Raises:
            Refusal: more than the server allows.
        """
        most = self.settings.max_tokens
        if asked is None:
            return min(most or unsaid, target.model.max_length or unsaid, unsaid)
        if most is not None and asked > most:
            raise Refusal(400, f"{name} may be at most {most} on this server, not {asked}", param=name)
        return asked

    async def events(self, job: Job) -> AsyncGenerator[list[TokenEvent], None]:
        """Submit a job and follow it to its end; closing the iterator, or its task, cancels the job.

        Raises:
            Refusal: it cannot be decoded, or takes too long, or the server stops; or, at the end, none of its completions could
                go on: where some could, the others have the finish reason `error`.
        """
        died = 0
        with self.refusing(None):
            self.start(job)
            try:
                async for events in job:
                    died += sum(event.finish_reason == "error" for event in events)
                    yield events
                if died == len(job.sequences):
                    raise DeadRow(job.sequences[0].error)
            finally:
                self.release(job)

    def start(self, job: Job) -> None:
        """Submit a job, unless that has been done.

        Raises:
            Refusal: there is no room for it: others may have come since it was prepared.
        """
        if job.deadline is None:
            self._check_room(len(job.sequences))
            worker, left = self.worker, self.remaining(job)
            with self.refusing(None):
                worker.submit(job)
            job.deadline = asyncio.get_running_loop().call_later(left, worker.cancel, job, TimeoutError())

    async def score(self, steps: Generator[None, None, T]) -> T:
        """Run a scoring (`trimtab.decode.scoring.score_in_steps`) between the engine's steps; what it returns.

        Raises:
            Refusal: there is no room for it.
            TimeoutError: it takes too long.
        """
        self._check_room(1)
        async with asyncio.timeout(self.settings.request_timeout):
            found: T = await self.worker.score(steps)
        return found

    def release(self, job: Job) -> None:
        """Nobody follows a job any more."""
        if job.deadline is not None:
            job.deadline.cancel()
        if self._worker is not None:
            self._worker.cancel(job)

    def remaining(self, job: Job) -> float:
        """Seconds until a job has taken too long."""
        return max(0.0, self.settings.request_timeout - (time.perf_counter() - job.arrived))

    @contextlib.contextmanager
    def refusing(self, param: str | None) -> Iterator[None]:
        """Turn errors of the library into answers about the field `param`, or about the field that the message begins with."""
        try:
            yield
        except (InvalidRequest, InvalidOption) as error:
            word = str(error).partition(" ")[0].partition("[")[0].rstrip(":,")
            raise Refusal(400, str(error), param=word if word.isidentifier() and word in FIELDS else param) from None
        except DeadRow as error:
            raise Refusal(400, str(error), code="dead_row") from None
        except Stopped as error:
            raise Refusal(503, str(error), retry_after=5) from None
        except EngineFailed as error:
            raise Refusal(500, str(error), code="engine_failed") from None
        except TimeoutError:
            limit = f"{self.settings.request_timeout:g} seconds"
            raise Refusal(504, f"the request took longer than {limit}: ask for fewer tokens", code="timeout") from None

    def _check_ready(self) -> None:
        state = self.state
        if state == "failed":
            raise Refusal(503, "the server has failed; see its log")
        if state != "ready":
            raise Refusal(503, f"the server is {state}", retry_after=5)

    def _check_room(self, sequences: int) -> None:
        assert self._opened is not None
        running = self._opened.engine.max_num_seqs
        if sequences > running + self.settings.max_waiting:
            most = running + self.settings.max_waiting
            raise Refusal(400, f"a request may have at most {most} completions, not {sequences}: ask for fewer", param="n")
        busy = self.worker.outstanding + self._fetching
        if busy + sequences > running + self.settings.max_waiting:
            message = f"{busy} sequences are running or waiting, which is what this server takes: try again"
            raise Refusal(429, message, code="queue_full", retry_after=1)


FIELDS = set(SamplingParams.__dataclass_fields__) | {
    *("prompt", "messages", "path", "tools", "chat_template_kwargs", "user", "chosen", "rejected")
}
"""Request fields that errors of the library begin with."""
