"""From a job's events to an answer: whole or as a stream, as a completion or as a chat."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from trimtab.data.prompts import Prompt
from trimtab.decode.request import Completion, SamplingParams, TokenEvent, TokenLogprobs
from trimtab.serve import wire
from trimtab.serve.echoes import Echo, echo_prompts
from trimtab.serve.offsets import Offsets
from trimtab.serve.refusal import Refusal
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.service import Service, Target
from trimtab.serve.users import Users, find_target
from trimtab.serve.worker import Job

__all__ = ["answer_chat", "answer_completion"]

requests = logging.getLogger("trimtab.serve.requests")


@dataclass
class _Exchange:
    """One request on its way.

    Attributes:
        service: the server.
        request: the client's.
        kind: `"chat"` or `"completion"`.
        target: its model.
        params: what was asked for.
        job: its sequences.
        include_usage: whether a stream ends with the usage.
        token_ids: whether choices have their tokens' ids.
        rewrites: the prompts that completions are rewritten for, if they are.
        generates: whether anything is generated at all.
        echoed: the prompts that completions begin with, if they are echoed.
        echoes: they, with ids and scores, once `events` has begun.
        tokens: how many were generated so far.
    """

    service: Service
    request: Request
    kind: str
    target: Target
    params: SamplingParams
    job: Job
    include_usage: bool
    token_ids: bool = False
    rewrites: Sequence[Prompt] = ()
    generates: bool = True
    echoed: Sequence[Prompt] = ()
    echoes: list[Echo] = field(default_factory=list)
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"

    def choice(self, event: TokenEvent) -> int:
        """Which choice of the answer an event belongs to."""
        return (event.prompt_index - self.job.first) * self.params.n + event.index

    def echo(self, choice: int) -> Echo | None:
        """What a choice's text begins with; once `events` has begun."""
        return self.echoes[choice // self.params.n] if self.echoes else None

    def offsets(self, choice: int) -> Offsets:
        """Where the tokens of a choice begin in its text; once `events` has begun."""
        echo = self.echo(choice)
        return Offsets(self.target.model.tokenizer, self.job.sequences[choice].prompt, len(echo.text) if echo else 0)

    @property
    def usage(self) -> wire.Usage:
        """Tokens so far."""
        readers = self.job.readers
        return wire.Usage(sum(len(s.prompt) for s in readers), self.tokens, sum(s.cached_tokens for s in readers))

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """What happens; logged and counted at the end, however it comes. The first is empty: what precedes is ready then."""
        outcome = "cancelled"
        try:
            if self.echoed:
                with self.service.refusing("prompt"):
                    self.echoes = await echo_prompts(
                        self.service, self.target.model, self.params, self.job, self.echoed, last=not self.generates
                    )
            yield []
            if self.generates:
                async for events in self.service.events(self.job):
                    self.tokens += sum(event.token is not None for event in events)
                    yield events
            outcome = "ok"
        except Refusal as refusal:
            outcome = refusal.code or str(refusal.status)
            raise
        finally:
            self._note(outcome)

    def _note(self, outcome: str) -> None:
        seconds = time.perf_counter() - self.job.arrived
        self.service.metrics.finish(self.target.label, self.job, seconds, outcome)
        first = self.job.first_token
        facts: dict[str, Any] = {
            "id": self.id,
            "request_id": self.request.state.request_id,
            "model": self.target.label,
            "outcome": outcome,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "completion_tokens": self.tokens,
            "seconds": round(seconds, 4),
            "first_token_seconds": None if first is None else round(first - self.job.arrived, 4),
        }
        if self.service.settings.log_prompts:
            decode = self.target.model.tokenizer.decode
            facts["prompts"] = [decode(s.prompt) for s in self.job.sequences if s.index == 0]
            facts["completions"] = [decode(s.tokens) for s in self.job.sequences]
        requests.info("request", extra={"facts": facts})


async def answer_completion(
    service: Service, request: Request, asked: CompletionRequest, size: int, users: Users | None
) -> Response:
    """`POST /v1/completions`; `size` is the body's in bytes, and `users` are those that have weights of their own.

    Raises:
        Refusal: it cannot be answered.
    """
    target, own = await find_target(service, asked, users)
    limit = service.limit(target, asked.max_tokens, "max_tokens", unsaid=16)
    wants = asked.logprobs is not None
    with service.refusing(None):
        params = SamplingParams(**asked.sampling(max(limit, 1), wants, asked.logprobs or 0), **own)
    prompts: Sequence[Prompt] = asked.prompts
    job = await service.prepare(target, prompts, params, "prompt", size=size)
    if asked.echo and wants and not target.model.shaping(params).rule.has_row:
        raise Refusal(400, f"logprobs with echo need a rule with a row, not '{params.rule}'", param="rule")
    exchange = _Exchange(
        service,
        request,
        "completion",
        target,
        params,
        job,
        asked.include_usage,
        bool(asked.return_token_ids),
        _texts_of(prompts, target) if asked.rewrite else (),
        generates=limit > 0,
        echoed=prompts if asked.echo else (),
    )
    return _stream(exchange, _completion_stream) if asked.stream else await _whole(exchange)


def _texts_of(prompts: Sequence[Prompt], target: Target) -> list[Prompt]:
    """Prompts as a rewriter is told them, which reads texts: token ids in words."""
    return [prompt if isinstance(prompt, str) else target.model.tokenizer.decode(prompt) for prompt in prompts]


async def answer_chat(service: Service, request: Request, asked: ChatRequest, size: int, users: Users | None) -> Response:
    """`POST /v1/chat/completions`; `size` is the body's in bytes, and `users` are those that have weights of their own.

    Raises:
        Refusal: it cannot be answered.
    """
    target, own = await find_target(service, asked, users)
    limit = service.limit(target, asked.limit, "max_completion_tokens")
    with service.refusing(None):
        params = SamplingParams(**asked.sampling(limit, bool(asked.logprobs), asked.top_logprobs or 0), **own)
    job = await service.prepare(target, [asked.chat], params, "messages", size=size)
    how = asked.include_usage, bool(asked.return_token_ids), [asked.chat] if asked.rewrite else ()
    exchange = _Exchange(service, request, "chat", target, params, job, *how)
    return _stream(exchange, _chat_stream) if asked.stream else await _whole(exchange)


# ---- whole answers


async def _whole(exchange: _Exchange) -> Response:
    """Wait for the end, or for the client to go away."""
    work = asyncio.ensure_future(_collect(exchange))
    leaving = asyncio.ensure_future(_leave(exchange.request))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal(499, "the client went away", code="cancelled")
        choices = work.result()
    finally:
        for task in (work, leaving):
            task.cancel()
    build = wire.chat_completion if exchange.kind == "chat" else wire.completion
    body = build(exchange.id, exchange.created, exchange.target.label, choices, exchange.usage)
    return Response(wire.dumps(body), media_type="application/json")


async def _leave(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(exchange: _Exchange) -> list[dict[str, Any]]:
    """All choices."""
    done: dict[int, Completion] = {}
    async for events in exchange.events():
        done |= {exchange.choice(event): event.completion for event in events if event.completion is not None}
    if not exchange.generates:
        none = Completion("", [], "length", 0, 0, 0, TokenLogprobs([], [], []))
        done = dict.fromkeys(range(len(exchange.job.sequences)), none)
    before: dict[int, dict[str, Any]] = {}
    if exchange.rewrites:
        service = exchange.service
        with service.refusing("rewrite"):
            async with asyncio.timeout(service.remaining(exchange.job)):
                done, before = await service.rewriting.rewrite(exchange.rewrites, done, exchange.params)
    return [_choice(exchange, index, done[index]) | before.get(index, {}) for index in sorted(done)]


def _choice(exchange: _Exchange, index: int, completion: Completion) -> dict[str, Any]:
    ids = {"token_ids": completion.tokens} if exchange.token_ids else {}
    return _plain_choice(exchange, index, completion) | ids


def _plain_choice(exchange: _Exchange, index: int, completion: Completion) -> dict[str, Any]:
    texts, logprobs = exchange.service.texts, None
    if exchange.kind == "chat":
        if exchange.params.logprobs:
            logprobs = wire.chat_logprobs(texts, *_columns(completion))
        choice = wire.chat_choice(index, completion.text, completion.finish_reason, logprobs)
        return choice | wire.beside(completion.error, completion.handover_at)
    echo = exchange.echo(index)
    text = (echo.text if echo else "") + completion.text
    if exchange.params.logprobs:
        tokens, values, tops = _columns(completion)
        offsets = exchange.offsets(index).add(tokens)
        if echo is not None:
            before, best = echo.logprobs()
            tokens, values, tops, offsets = echo.ids + tokens, before + values, best + tops, echo.offsets + offsets
        logprobs = wire.completion_logprobs(texts, tokens, values, tops, offsets)
    reason, error = _ending(echo, completion.finish_reason, completion.error)
    return wire.completion_choice(index, text, reason or "", logprobs) | wire.beside(error, completion.handover_at)


def _ending(echo: Echo | None, reason: str | None, error: str | None) -> tuple[str | None, str | None]:
    """A choice's finish reason and error: where its prompt could not be scored, it ends with that."""
    return ("error", echo.error) if reason and echo is not None and echo.error else (reason, error)


def _columns(completion: Completion) -> tuple[list[int], list[Any], list[Any]]:
    """Tokens, their log-probabilities, and the best of each position."""
    scores = completion.logprobs
    assert scores is not None
    return completion.tokens, list(scores.aligned), list(scores.top_aligned or [[]] * len(completion.tokens))


# ---- streams


class _Events(StreamingResponse):
    """A stream of server-sent events, which gives up its job however it ends, and even if it never begins."""

    media_type = "text/event-stream"

    def __init__(self, exchange: _Exchange, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, headers={"cache-control": "no-cache"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.service.release(self._exchange.job)


def _stream(exchange: _Exchange, chunks: Callable[[_Exchange], AsyncIterator[bytes]]) -> Response:
    if exchange.generates:
        exchange.service.start(exchange.job)  # what has no room is refused now, before the answer begins
    return _Events(exchange, _guarded(exchange, chunks))


async def _guarded(exchange: _Exchange, chunks: Callable[[_Exchange], AsyncIterator[bytes]]) -> AsyncIterator[bytes]:
    """A stream's events, with what goes wrong as the last of them."""
    try:
        async for chunk in chunks(exchange):
            yield chunk
    except Refusal as refusal:
        yield wire.sse(wire.error_body(refusal.message, refusal.type, refusal.param, refusal.code))
    yield wire.DONE


async def _chat_stream(exchange: _Exchange) -> AsyncIterator[bytes]:
    stream = wire.ChatStream(exchange.id, exchange.created, exchange.target.label, include_usage=exchange.include_usage)
    texts = exchange.service.texts
    yield b"".join(stream.start(index) for index in range(exchange.params.n))
    async for events in exchange.events():
        chunks = []
        for index, mine in _by_choice(exchange, events).items():
            text = "".join(event.text for event in mine)
            columns = _event_columns(mine)
            logprobs = wire.chat_logprobs(texts, *columns) if exchange.params.logprobs and columns[0] else None
            if text or logprobs:
                chunks.append(stream.text(index, text, logprobs))
            if reason := mine[-1].finish_reason:
                chunks.append(stream.end(index, reason, *_beside(mine)))
        if chunks:
            yield b"".join(chunks)
    if exchange.include_usage:
        yield stream.usage(exchange.usage)


async def _completion_stream(exchange: _Exchange) -> AsyncIterator[bytes]:
    stream = wire.CompletionStream(exchange.id, exchange.created, exchange.target.label, include_usage=exchange.include_usage)
    texts, count = exchange.service.texts, len(exchange.job.sequences)
    offsets: list[Offsets] = []
    async for events in exchange.events():
        chunks = []
        offsets = offsets or [exchange.offsets(index) for index in range(count)]
        for index in range(count) if exchange.echoes and not events else ():
            echo, logprobs = exchange.echoes[index // exchange.params.n], None
            if exchange.params.logprobs:
                logprobs = wire.completion_logprobs(texts, echo.ids, *echo.logprobs(), echo.offsets)
            reason, error = _ending(echo, None if exchange.generates else "length", None)
            chunks.append(stream.text(index, echo.text, logprobs, reason, error))
        for index, mine in _by_choice(exchange, events).items():
            text, logprobs = "".join(event.text for event in mine), None
            error, handover_at = _beside(mine)
            reason, error = _ending(exchange.echo(index), mine[-1].finish_reason, error)
            columns = _event_columns(mine)
            if exchange.params.logprobs and columns[0]:
                logprobs = wire.completion_logprobs(texts, *columns, offsets[index].add(columns[0]))
            if text or logprobs or reason:
                chunks.append(stream.text(index, text, logprobs, reason, error, handover_at))
        if chunks:
            yield b"".join(chunks)
    if exchange.include_usage:
        yield stream.usage(exchange.usage)


def _by_choice(exchange: _Exchange, events: Sequence[TokenEvent]) -> dict[int, list[TokenEvent]]:
    sorted_events: dict[int, list[TokenEvent]] = {}
    for event in events:
        sorted_events.setdefault(exchange.choice(event), []).append(event)
    return sorted_events


def _beside(events: Sequence[TokenEvent]) -> tuple[str | None, int | None]:
    """Of a choice that has come to its end: why it could not go on, if so, and where it was handed over, if it was."""
    whole = events[-1].completion
    return (None, None) if whole is None else (whole.error, whole.handover_at)


def _event_columns(events: Sequence[TokenEvent]) -> tuple[list[int], list[Any], list[Any]]:
    """Tokens of some events, their log-probabilities, and the best of each position."""
    drawn = [e for e in events if e.token is not None]
    return [e.token for e in drawn if e.token is not None], [e.aligned for e in drawn], [e.top_aligned or () for e in drawn]
