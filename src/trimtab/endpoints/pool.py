"""Share requests out among endpoints: the least busy first, never too many at once, and again where one fails.

An endpoint that fails rests for a while, longer each time, or as long as it asks for with `Retry-After`; then a single request
tries it, and the first success opens it again. The others take over meanwhile. A request is given up when it has itself failed
too often, and all of them are when every endpoint has failed too often in a row.
"""

import asyncio
import contextlib
import logging
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from trimtab.endpoints.settings import Limits, base_url
from trimtab.errors import EndpointError

__all__ = ["Pool", "Send"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

RETRIED = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which the same request may succeed."""

LONGEST_REST = 30.0
"""Seconds that an endpoint rests at the most, unless it asks for more."""

LONGEST_WISH = 3600.0
"""Seconds of rest that an endpoint may ask for; it is asked again then, whatever it said."""

UNUSABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What reading an answer may end with, whatever the endpoint has sent."""


class Send(Protocol):
    """Sends one request: what `httpx2.AsyncClient.request` does."""

    async def __call__(self, method: str, url: str, *, json: Any = None) -> Any:
        """The response."""


@dataclass(eq=False)
class _Endpoint:
    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    problem: str = ""
    """What was wrong the last time."""

    @property
    def name(self) -> str:
        """The URL without a user's name and password, for messages."""
        return self.url.replace(f"{urlsplit(self.url).netloc.rpartition('@')[0]}@", "")


@dataclass(eq=False)
class _Waiting:
    failed_at: set[_Endpoint]
    granted: "asyncio.Future[_Endpoint]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Failure(Exception):
    """A failure after which another try makes sense."""

    def __init__(
        self, problem: str, *, unavailable: bool = False, rest: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(problem)
        self.status = status
        self.unavailable = unavailable
        """The endpoint did not look at the request, whose own fault it so cannot be."""
        self.rest = rest


class Pool:
    """Endpoints that answer alike. All calls are made in one event loop.

    Args:
        urls: where they are.
        limits: how much to ask of each.
        send: who sends.
        connecting: the exceptions of `send` for an endpoint that cannot be reached.
        failing: those for a request that was lost on the way.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: Limits,
        send: Send,
        connecting: tuple[type[Exception], ...],
        failing: tuple[type[Exception], ...],
    ) -> None:
        self._endpoints = [_Endpoint(url) for url in dict.fromkeys(map(base_url, urls))]
        self._limits, self._send, self._connecting, self._failing = limits, send, connecting, failing
        self._waiting: deque[_Waiting] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    async def request(
        self,
        method: str,
        path: str,
        body: Any,
        read: Callable[[Any], T],
        lost: Callable[[], None] = lambda: None,
    ) -> T:
        """Ask some endpoint until one gives an answer that can be read.

        Args:
            method: GET or POST.
            path: such as `/v1/models`.
            body: JSON, or None.
            read: takes what is needed from the answer's JSON. One of `UNUSABLE` means that it is not there, and that the
                request is worth another try.
            lost: called for each try whose answer did not come or could not be used, which may have cost something.

        Raises:
            EndpointError: it is refused, has failed too often, or no endpoint answers.
        """
        failed_at: set[_Endpoint] = set()
        failures = 0
        while True:
            # What follows waits for a request that failed, so it goes first; but if it fails again, others are to find out
            # whether it or the endpoint is at fault.
            endpoint = await self._acquire(_Waiting(failed_at), first=bool(failed_at) and failures < 2)
            try:
                answer = await self._ask(endpoint, method, path, body, read)
            except _Failure as failure:
                failed_at.add(endpoint)
                if not failure.unavailable:
                    failures += 1
                    lost()
                if failures > self._limits.max_retries:
                    with contextlib.suppress(EndpointError):  # this request's own failure says more
                        self._note(endpoint, failure)
                    endpoint.failures = 0  # as far as can be told, it was the request
                    error = EndpointError(f"{endpoint.name} {failure} (a request to {path} failed {failures} times)")
                    error.status = failure.status
                    raise error from None
                self._note(endpoint, failure)
                pause = self._pause(endpoint, failures) if failures and failed_at.issuperset(self._endpoints) else 0.0
            else:
                if endpoint.failures:
                    logger.info("%s answers", endpoint.name)
                endpoint.failures = 0
                return answer
            finally:
                endpoint.in_flight -= 1
                self._dispatch()
            await asyncio.sleep(pause)

    async def _ask(self, endpoint: _Endpoint, method: str, path: str, body: Any, read: Callable[[Any], T]) -> T:
        try:
            async with asyncio.timeout(self._limits.request_timeout):
                response = await self._send(method, endpoint.url + path, json=body)
        except self._connecting as error:
            raise _Failure(f"cannot be reached: {_words(error)}", unavailable=True) from None
        except TimeoutError:
            raise _Failure(f"gave no answer in {self._limits.request_timeout:g} seconds") from None
        except self._failing as error:
            raise _Failure(f"lost the connection: {_words(error)}") from None
        if response.status_code in RETRIED or response.status_code >= 500:
            busy = response.status_code in (429, 503)
            said = f"answered {response.status_code}: {_message(response)}"
            rest = _retry_after(response.headers.get("retry-after"))
            raise _Failure(said, unavailable=busy, rest=rest, status=response.status_code)
        if not 200 <= response.status_code < 300:
            refusal = EndpointError(f"{endpoint.name}{path} answered {response.status_code}: {_message(response)}")
            refusal.status, refusal.code = response.status_code, _code(response)
            raise refusal
        try:
            return read(response.json())
        except UNUSABLE as error:
            raise _Failure(
                f"an answer that cannot be used ({type(error).__name__}: {error}): {_short(response.text)}"
            ) from None

    async def _acquire(self, waiting: _Waiting, *, first: bool) -> _Endpoint:
        """Wait for an endpoint with room; a request that goes again is `first`, since what comes after it waits for it."""
        (self._waiting.appendleft if first else self._waiting.append)(waiting)
        self._dispatch()
        try:
            return await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.granted.cancelled() and waiting.granted.exception() is None:
                waiting.granted.result().in_flight -= 1
            raise

    def _dispatch(self) -> None:
        """Give endpoints with room to whom waits, in order."""
        now = time.monotonic()
        for waiting in list(self._waiting):
            free = [e for e in self._endpoints if e.rests_until <= now and e.in_flight < self._room(e)]
            if not free:
                break
            if any(e.failures == 0 and e not in waiting.failed_at for e in self._endpoints):
                free = [e for e in free if e not in waiting.failed_at]  # another one is up: rather wait for it
            if free and not waiting.granted.done():
                endpoint = min(free, key=lambda e: (e.failures, e.in_flight))
                endpoint.in_flight += 1
                self._waiting.remove(waiting)
                waiting.granted.set_result(endpoint)
        if self._alarm is not None:
            self._alarm.cancel()
        resting = [e.rests_until - now for e in self._endpoints if e.rests_until > now]
        self._alarm = None
        if resting and self._waiting:
            self._alarm = asyncio.get_running_loop().call_later(min(resting), self._dispatch)

    def _room(self, endpoint: _Endpoint) -> int:
        return 1 if endpoint.failures else self._limits.concurrency

    def _note(self, endpoint: _Endpoint, failure: _Failure) -> None:
        """Let the endpoint rest; give up on everything where that leaves none."""
        now = time.monotonic()
        endpoint.problem = str(failure)
        if endpoint.rests_until <= now:  # what was in flight when it failed fails with it, and counts once
            endpoint.failures += 1
            endpoint.rests_until = now + self._pause(endpoint, endpoint.failures)
            logger.warning("%s %s; failure %d in a row", endpoint.name, failure, endpoint.failures)
        if failure.rest is not None:
            if failure.rest > LONGEST_REST:
                logger.warning("%s asks for a rest of %.0f seconds; waiting", endpoint.name, failure.rest)
            endpoint.rests_until = max(endpoint.rests_until, now + failure.rest)
        if all(e.failures > self._limits.max_retries for e in self._endpoints):
            problems = "; ".join(f"{e.name} {e.problem}" for e in self._endpoints)
            while self._waiting:
                waiting = self._waiting.popleft()
                if not waiting.granted.done():
                    waiting.granted.set_exception(_all_down(problems))
            raise _all_down(problems)

    def _pause(self, endpoint: _Endpoint, failures: int) -> float:
        """Seconds; what is added keeps processes that failed together from coming back together."""
        spread = zlib.crc32(f"{os.getpid()} {endpoint.url} {failures}".encode()) / 2**32
        return float(min(self._limits.backoff * 2 ** (failures - 1), LONGEST_REST) * (1 + spread / 4))


def _all_down(problems: str) -> EndpointError:
    error = EndpointError(f"no endpoint is left: {problems}")
    error.all_down = True
    return error


def _message(response: Any) -> str:
    """A server's own words for an error: OpenAI's shape, or others."""
    try:
        body = response.json()
    except UNUSABLE:
        return _short(response.text) or "no message"
    said = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    message = str(said.get("message", said) if isinstance(said, dict) else said)
    field = said.get("param") if isinstance(said, dict) else None
    return _short(f"{message} ({field})" if isinstance(field, str) and field not in message else message)


def _code(response: Any) -> str | None:
    """OpenAI's `code` of an error."""
    try:
        code = response.json()["error"]["code"]
    except UNUSABLE:
        return None
    return code if isinstance(code, str) else None


def _retry_after(text: str | None) -> float | None:
    """Seconds, from seconds or a date."""
    if text is None:
        return None
    try:
        seconds = float(text) if text.strip().isdecimal() else (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WISH)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _short(text: str) -> str:
    text = " ".join(text[:5000].encode(errors="backslashreplace").decode().split())
    return text if len(text) <= 500 else f"{text[:500]}…"
