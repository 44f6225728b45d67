"""Aligners by the names that the embedded server's clients use, in front of `vllm serve`.

vLLM knows one model and takes our fields in `vllm_xargs`. With `--middleware trimtab.vllm.middleware.AlignerNames`, `model` may
be an aligner's name, `BASE:ALIGNER` or the base, and `aligner`, `weight`, `rule` and the rest may stand in the body itself, so
that clients of `trimtab serve` need not change. `/v1/models` lists the aligners. Whatever else is asked passes unchanged.
`AllowedPages` stands before all of it, and keeps out web pages of other origins.
"""

import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.origins import Origins, is_json
from trimtab.vllm.settings import FIELDS, Settings, as_lists, field_of, read_settings

__all__ = ["HOSTS_VARIABLE", "AlignerNames", "AllowedPages"]

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

REQUESTS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"),
    *("/v1/responses", "/v1/messages", "/invocations"),
)
MODELS = "/v1/models"
GUARDED = "/v1"
"""Where vLLM wants a key; `/invocations` it answers without one."""

HOSTS_VARIABLE = "TRIMTAB_ALLOWED_HOSTS"
"""Of the environment: names that the server answers to beside its own, with spaces between them."""


class AllowedPages:
    """ASGI middleware, for `vllm serve --middleware`: lets in the pages of `--allowed-origins`, and what is no page.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._origins: Origins | None = None
        self._with_cors = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request or socket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if self._origins is None:  # what vLLM was started with is known once it serves
            args, hosts = scope["app"].state.args, os.environ.get(HOSTS_VARIABLE, "").split()
            self._origins = Origins(args.allowed_origins, host=args.host or "0.0.0.0", hosts=hosts)
            self._with_cors = self._origins.with_cors(self._app)
        refusal = self._origins.refusal(scope)
        if refusal is None:
            await self._with_cors(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            await _refuse(send, 403, refusal[0])


class AlignerNames:
    """ASGI middleware, for `vllm serve --middleware`.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._started = int(time.time())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        method, path = (scope["method"], _path(scope)) if scope["type"] == "http" else ("", "")
        if path.startswith(GUARDED) and not _has_key(
            scope
        ):  # vLLM looks at keys behind us: what comes without one is not ours to read
            method = ""
        if method == "POST" and path in REQUESTS:
            await self._translate(scope, receive, send)
        elif method == "GET" and path == MODELS:
            await self._list(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _translate(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return
        if body and not is_json([value for name, value in scope["headers"] if name.lower() == b"content-type"]):
            await _refuse(send, 415, "send the header 'Content-Type: application/json' (curl: --json, or -H)")
            return
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if isinstance(given, dict):
            bases, settings = _names(scope)
            try:
                translated = translate(given, bases, settings)
            except ValueError as error:
                await _refuse(send, 400, str(error), field_of(error))
                return
            if translated is not given:
                body = json.dumps(translated).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        await self._app(scope, _replay(body, receive), send)

    async def _list(self, scope: Message, receive: Receive, send: Send) -> None:
        """The application's answer with the aligners in it."""
        bases, settings = _names(scope)
        start: Message = {}
        body = b""

        async def collect(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            if start["status"] == 200:
                answer = json.loads(body)
                for name, path in settings.aligners.items() if settings else ():
                    card = {"id": name, "object": "model", "created": self._started, "owned_by": "trimtab"}
                    answer["data"].append(card | {"root": path, "parent": bases[0]})
                body = json.dumps(answer).encode()
            headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, collect)


def translate(body: dict[str, Any], bases: list[str], settings: Settings | None) -> dict[str, Any]:
    """A request of the embedded server's kind as vLLM wants it; one of vLLM's kind as it is.

    Args:
        body: the request's.
        bases: what the proposal is called; the first counts.
        settings: the operator's.

    Raises:
        ValueError: the request says something twice.
    """
    asked = {name: body[name] for name in FIELDS if body.get(name) is not None}
    model = body.get("model")
    aligners = settings.aligners if settings else {}
    base, _, name = model.rpartition(":") if isinstance(model, str) else ("", "", "")
    if isinstance(model, str) and model not in bases and (model in aligners or (base in bases and name in aligners)):
        if "aligner" in asked:
            raise ValueError(f"aligner: the model '{model}' names an aligner; name the base, {bases[0]}, to choose others")
        asked["aligner"] = model if model in aligners else name
        body = {**body, "model": bases[0]}
    if not asked:
        return body
    xargs = body.get("vllm_xargs") or {}
    if not isinstance(xargs, dict):
        return body
    if twice := sorted(set(asked) & set(xargs)):
        raise ValueError(f"{twice[0]} is given twice, in vllm_xargs and outside")
    kept = {name: value for name, value in body.items() if name not in FIELDS}
    try:
        return {**kept, "vllm_xargs": {**xargs, **as_lists(asked)}}  # vLLM takes lists there, and no objects
    except InvalidRequest as error:
        raise ValueError(str(error)) from None


def _names(scope: Message) -> tuple[list[str], Settings | None]:
    """What the proposal is called, and the configured aligners."""
    state = scope["app"].state
    served = state.args.served_model_name
    return list(served or [state.args.model]), read_settings(state.vllm_config.additional_config)


def _path(scope: Message) -> str:
    """Without `--root-path`, which some proxies leave in it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _has_key(scope: Message) -> bool:
    """Whether the request has a key that vLLM would take; any request, where vLLM wants none."""
    keys = scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    wanted = [key.encode() for key in keys if key]
    scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return not wanted or (scheme.lower() == b"bearer" and any(hmac.compare_digest(given, key) for key in wanted))


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if the client leaves before its end."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = bool(message.get("more_body"))
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that was read, once more; then whatever the client does next, such as leaving."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, message: str, param: str | None = None) -> None:
    """An error in OpenAI's shape, with vLLM's words."""
    kind = HTTPStatus(status).phrase.replace(" ", "") + "Error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
