"""What stands before every request: its id, where it comes from, the key, the size of its body, and an answer when something
breaks.

Plain ASGI, so that streams pass through unbuffered. Add it innermost of Starlette's own error handling, by
`app.add_middleware(Guard, …)`: outside of that, a failure would have been answered before it gets here.
"""

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Iterable, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import InvalidOption
from trimtab.origins import Origins
from trimtab.serve.wire import dumps, error_body

__all__ = ["Guard", "check_keys"]

logger = logging.getLogger(__name__)

_SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LENGTH = re.compile(rb"[0-9]{1,19}")


class Guard:
    """ASGI middleware.

    Each request has an id, the client's own if it is up to 64 letters, digits, `.`, `_` and `-`, in
    `request.state.request_id` and on the answer. Refusals and failures have OpenAI's shape: 400 for a malformed
    Content-Length, 401 without a key, 403 for a web page of another origin, 413 for too long a body, and 500, without
    details, for an exception of the application, which is logged. If the answer has begun by then, it is cut short. Pages
    that are allowed can read all of these but a 403, and need no key to ask whether they may.

    Args:
        app: what is guarded.
        keys: bearer tokens that are accepted; none leaves everything open.
        protected: prefixes of paths that need a key: `"/v1"` is `/v1` and all below it, `"/"` everything.
        max_body_bytes: the longest body that is read, declared or counted.
        origins: which pages may use the application; default: its own.

    Raises:
        InvalidOption: a key is empty, or has space around it, which no header can carry.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Iterable[str] = (),
        protected: Sequence[str] = ("/v1",),
        max_body_bytes: int,
        origins: Origins | None = None,
    ) -> None:
        keys = list(keys)
        check_keys(keys)
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._protected = tuple(prefix.rstrip("/") + "/" for prefix in protected)
        self._max_body_bytes = max_body_bytes
        self._origins = origins or Origins()
        self._check_with_cors = self._origins.with_cors(self._check)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request_id = _request_id(_header(scope, b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        refusal = self._origins.refusal(scope)
        if refusal is None:
            await self._check_with_cors(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            await _Exchange(receive, send, request_id, self._max_body_bytes).refuse(403, *refusal, _VARIES)

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer, what is no page's business or an allowed page's."""
        allowed = not self._needs_key(scope) or self._has_key(_header(scope, b"authorization"))
        if scope["type"] == "websocket":
            if allowed:
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": "an API key is needed"})
            return
        exchange = _Exchange(receive, send, scope["state"]["request_id"], self._max_body_bytes)
        if not allowed:
            await exchange.refuse(401, _NO_KEY, "invalid_api_key", [(b"www-authenticate", b"Bearer")])
        elif not (lengths := _header(scope, b"content-length")):
            await self._run(scope, exchange)
        elif len(set(lengths)) > 1 or not _LENGTH.fullmatch(lengths[0]):
            await exchange.refuse(400, "Content-Length must be one number of bytes", "invalid_content_length", _CLOSE)
        elif int(lengths[0]) > self._max_body_bytes:
            await exchange.refuse_body()
        else:
            await self._run(scope, exchange)

    async def _run(self, scope: Scope, exchange: "_Exchange") -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            logger.debug("request %s: the client went away", exchange.request_id)
        except Exception:
            if exchange.refused:  # the body was too long, and reading it is what failed
                return
            logger.exception("request %s: %s %r failed", exchange.request_id, scope["method"], scope["path"])
            message = f"the server failed; it has logged why under request {exchange.request_id}"
            await exchange.refuse(500, message, "internal_error", type="server_error")

    def _needs_key(self, scope: Scope) -> bool:
        """Whether the path, or what is left of it below the root where the application is mounted, is protected."""
        path, root = scope["path"], scope.get("root_path", "")
        return bool(self._digests) and any(f"{p}/".startswith(self._protected) for p in (path, path.removeprefix(root)))

    def _has_key(self, values: Sequence[bytes]) -> bool:
        """Compare with every key, in time that depends neither on how many characters agree nor on which key it is."""
        if len(values) != 1:
            return False
        scheme, _, token = values[0].partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def check_keys(keys: Iterable[str]) -> None:
    """Refuse keys that no header can carry.

    Raises:
        InvalidOption: a key is empty, or has space around it.
    """
    if not all(key and key == key.strip() and key.isprintable() for key in keys):
        raise InvalidOption("an API key must be printable characters without space around them")


_NO_KEY = "this server needs an API key: send 'Authorization: Bearer KEY' with one of its keys"
_CLOSE = [(b"connection", b"close")]
"""On answers to a body that is not going to be read."""
_VARIES = [(b"vary", b"Origin")]


class _Exchange:
    """One request and its answer: counts the body, names the request on the answer, and can answer in the app's place."""

    def __init__(self, receive: Receive, send: Send, request_id: str, max_body_bytes: int) -> None:
        self.request_id = request_id
        self.begun = self.refused = False
        self._receive, self._send = receive, send
        self._left = self._max_body_bytes = max_body_bytes

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                await self.refuse_body()
                raise ClientDisconnect
        return message

    async def send(self, message: Message) -> None:
        if self.refused:  # the app's own answer comes too late
            return
        if message["type"] == "http.response.start":
            self.begun = True
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        await self._send(message)

    async def refuse_body(self) -> None:
        """Answer that the body is too long."""
        message = f"the body is longer than the {self._max_body_bytes} bytes that this server reads"
        await self.refuse(413, message, "request_too_large", _CLOSE)

    async def refuse(
        self,
        status: int,
        message: str,
        code: str,
        headers: Sequence[tuple[bytes, bytes]] = (),
        type: str = "invalid_request_error",
    ) -> None:
        """Answer with an error in OpenAI's shape; an answer that has begun is cut short instead."""
        if self.begun:
            self.refused = True
            return
        body = dumps(error_body(message, type, None, code))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
        self.refused = True


def _header(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


def _request_id(values: Sequence[bytes]) -> str:
    return values[0].decode() if len(values) == 1 and _SAFE_ID.fullmatch(values[0]) else uuid.uuid4().hex
