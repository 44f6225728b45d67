"""The HTTP application: routes, error shapes and the OpenAPI document."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from trimtab import __version__
from trimtab.errors import TrimtabError
from trimtab.origins import is_json
from trimtab.serve import wire
from trimtab.serve.answers import answer_chat, answer_completion
from trimtab.serve.bodies import Feedback, LoadAligner, Preference, UnloadAligner
from trimtab.serve.explain import explain
from trimtab.serve.feedback import FeedbackBook, key_name
from trimtab.serve.follow import following
from trimtab.serve.guard import Guard
from trimtab.serve.metrics import CONTENT_TYPE
from trimtab.serve.refusal import Refusal
from trimtab.serve.registry import Entry, NoSuchAligner, NoSuchFolder, OutOfMemory
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.service import Service
from trimtab.serve.users import Users

__all__ = ["make_app"]

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
Handler = TypeVar("Handler", bound=Callable[..., Any])
ERROR = {"$ref": "#/components/schemas/Error"}
_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
NOT_JSON = "the body must be said to be JSON: send 'Content-Type: application/json' (curl: -H 'Content-Type: application/json')"
MEANINGS = {
    400: "A field is wrong; the message names it.",
    401: "The server needs an API key.",
    403: "The request is a web page's of another origin, or for another server.",
    404: "There is no such model, aligner or user.",
    408: "The body did not arrive in time.",
    409: "Two fields contradict each other, or say nothing together.",
    413: "The body is too long.",
    415: "The body is not said to be JSON.",
    429: "Too many requests are waiting; Retry-After says when to ask again.",
    500: "The server failed.",
    503: "The server is loading, stopping, or has failed.",
    504: "The request took too long.",
}


def make_app(service: Service, *, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The application around a service.

    Args:
        service: it is opened when the application starts, and closed when it ends.
        on_failure: called if it cannot be opened.
    """
    users = None if service.settings.users is None else Users(service.settings.users, service)

    async def open_service() -> None:
        try:
            if users is not None:
                await users.open()
            await service.open()
            logger.info("ready: %s", service.settings.name)
        except Exception as error:
            service.failure = error
            if not isinstance(error, TrimtabError):
                logger.exception("the models cannot be loaded")
            on_failure()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.ensure_future(open_service())  # /health says "loading" meanwhile
        async with following(service):
            yield
        await opening
        await service.close()
        if users is not None:
            users.close()

    app = FastAPI(title="Trimtab", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.state.service = service
    app.add_middleware(
        Guard,
        keys=service.settings.api_keys,
        protected=("/v1",),
        max_body_bytes=service.settings.max_body_bytes,
        origins=service.settings.origins,
    )
    _add_errors(app)
    _add_operations(app, service)
    _add_models(app, service)
    _add_generation(app, service, users)
    if users is not None:
        _add_users(app, service, users)
    if service.settings.feedback is not None:
        _add_feedback(app, service, FeedbackBook(service.settings.feedback, service.settings.feedback_per_hour))
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _get(app: FastAPI, path: str, **described: Any) -> Callable[[Handler], Handler]:
    """A route for GET, and for HEAD, which the OpenAPI document does not repeat."""

    def add(handler: Handler) -> Handler:
        app.get(path, **described)(handler)
        app.head(path, include_in_schema=False)(handler)
        return handler

    return add


def _add_operations(app: FastAPI, service: Service) -> None:
    @_get(app, "/health", responses=_answers(503, health=True), tags=["operations"])
    async def health() -> Response:
        """Whether the server is loading, ready, stopping or failed."""
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @_get(app, "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["operations"])
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(await asyncio.to_thread(service.metrics.render), media_type=CONTENT_TYPE)


def _card(service: Service, entry: Entry) -> dict[str, Any]:
    """An aligner's entry of `/v1/models`."""
    most = service.registry.context_of(entry)
    return wire.model_card(entry.name, entry.created, root=entry.name, parent=service.settings.name, max_model_len=most)


def _add_models(app: FastAPI, service: Service) -> None:
    def cards() -> list[dict[str, Any]]:
        base, registry = service.settings.name, service.registry
        listed = [wire.model_card(base, service.created, root=base, max_model_len=registry.base.max_length)]
        return listed + [_card(service, entry) for entry in registry.entries]

    @_get(app, "/v1/models", responses=_answers(503), tags=["models"])
    async def list_models() -> Response:
        """The base, and every aligner."""
        return JSONResponse(wire.model_list(cards()))

    @_get(app, "/v1/models/{model:path}", responses=_answers(404, 503), tags=["models"])
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        for card in cards():
            if card["id"] == service.plain_name(model):
                return JSONResponse(card)
        raise Refusal(404, f"there is no model '{model[:128]}'", param="model", code="model_not_found")

    if service.settings.allow_loading:
        _add_loading(app, service)


def _add_loading(app: FastAPI, service: Service) -> None:
    answers = _answers(400, 404, 408, 413, 415, 503)

    @app.post("/v1/load_aligner", openapi_extra=_body(LoadAligner), responses=answers, tags=["models"])
    async def load_aligner(request: Request) -> Response:
        """Add an aligner from under the server's root folder, or replace the one of that name."""
        asked, _ = await _parse(service, request, LoadAligner)
        if service.plain_name(asked.name) == service.settings.name:
            raise Refusal(400, f"name: '{asked.name}' is the base's name", param="name")
        registry = service.registry
        try:
            entry = await service.load(registry.load, asked.name, asked.path, pinned=bool(asked.pin), inside=True)
        except NoSuchFolder as error:
            raise Refusal(404, str(error), param="path") from None
        except OutOfMemory as error:
            raise Refusal(400, str(error), param="path", code="out_of_memory") from None
        except TrimtabError as error:
            logger.warning("aligner %s cannot be loaded: %s", asked.name, error)
            raise Refusal(400, registry.hide_root(str(error)), param="path") from None
        except Exception as error:  # what is in the folder may break the libraries in any way
            logger.exception("aligner %s cannot be loaded", asked.name)
            raise Refusal(400, f"the folder cannot be loaded: {type(error).__name__}", param="path") from None
        return JSONResponse(_card(service, entry))

    @app.post("/v1/unload_aligner", openapi_extra=_body(UnloadAligner), responses=answers, tags=["models"])
    async def unload_aligner(request: Request) -> Response:
        """Forget an aligner; requests that run with it go on."""
        asked, _ = await _parse(service, request, UnloadAligner)
        try:
            service.registry.unload(asked.name)
        except NoSuchAligner as error:
            raise Refusal(404, str(error), param="name", code="model_not_found") from None
        service.metrics.forget(asked.name)
        return JSONResponse({"id": asked.name, "object": "model", "deleted": True})


def _add_generation(app: FastAPI, service: Service, users: Users | None) -> None:
    answers = _answers(400, 404, 408, 413, 415, 429, 503, 504, stream=True)

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest), responses=answers, tags=["generation"])
    async def completions(request: Request) -> Response:
        """Complete prompts."""
        asked, size = await _parse(service, request, CompletionRequest)
        return await answer_completion(service, request, asked, size, users)

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest), responses=answers, tags=["generation"])
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        asked, size = await _parse(service, request, ChatRequest)
        return await answer_chat(service, request, asked, size, users)


def _add_users(app: FastAPI, service: Service, users: Users) -> None:
    answers = _answers(400, 404, 408, 409, 413, 415, 429, 503, 504)

    @app.post("/v1/users/{user}/preferences", openapi_extra=_body(Preference), responses=answers, tags=["users"])
    async def prefer(request: Request, user: str) -> Response:
        """Learn that a user prefers one answer to another: how many nats apart they are to each aligner is kept, no text."""
        asked, _ = await _parse(service, request, Preference)
        return JSONResponse(await users.prefer(user, asked))

    @_get(app, "/v1/users/{user}", responses=_answers(400, 404, 503), tags=["users"])
    async def known(user: str) -> Response:
        """A user's weights, and how sure they are."""
        return JSONResponse(await users.known(user))

    @app.delete("/v1/users/{user}", responses=_answers(400, 404, 503), tags=["users"])
    async def forget(user: str) -> Response:
        """Delete all that is kept of a user."""
        await users.forget(user)
        return JSONResponse({"id": user, "object": "user", "deleted": True})


def _add_feedback(app: FastAPI, service: Service, book: FeedbackBook) -> None:
    answers = _answers(400, 408, 413, 415, 429, 503)

    @app.post("/v1/feedback", openapi_extra=_body(Feedback), responses=answers, tags=["feedback"])
    async def feedback(request: Request) -> Response:
        """Keep what somebody says of an answer: a vote, a correction or a thumb, with the texts."""
        asked, _ = await _parse(service, request, Feedback)
        key = key_name(request.headers.get("authorization", "").partition(" ")[2].strip())
        book.admit(key)
        with service.refusing("prompt"):
            try:
                row = await asyncio.to_thread(book.append, asked, key)
            except OSError as error:
                logger.exception("feedback cannot be kept")
                raise Refusal(503, f"the feedback cannot be kept: {error.strerror}") from error
        return JSONResponse({"object": "feedback", "kind": row["feedback"], "time": row["time"]})


async def _parse(service: Service, request: Request, model: type[M]) -> tuple[M, int]:
    """The body, and its length in bytes."""
    try:
        async with asyncio.timeout(service.settings.request_timeout):
            body = await request.body()
        if body and not is_json([value for name, value in request.headers.raw if name == b"content-type"]):
            raise Refusal(415, NOT_JSON, code="unsupported_media_type")
        return model.model_validate_json(body), len(body)
    except TimeoutError:
        raise Refusal(408, "the body did not arrive in time") from None
    except ValidationError as error:
        message, param = explain(error)
        raise Refusal(400, message, param=param) from None


# ---- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
        body = wire.error_body(refusal.message, refusal.type, refusal.param, refusal.code)
        return Response(wire.dumps(body), refusal.status, headers, "application/json")

    @app.exception_handler(HTTPException)
    async def explain_status(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:128]}: {str(error.detail).lower()}"
        headers = dict(error.headers or {})
        if "Allow" in headers:  # Starlette looks no further than the first route of the path
            headers["Allow"] = ", ".join(sorted(_methods(app, request.scope)))
        body = wire.error_body(message, "invalid_request_error")
        return Response(wire.dumps(body), error.status_code, headers, "application/json")


def _methods(app: FastAPI, scope: Scope) -> set[str]:
    """What the routes of a path take."""
    found = [route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    return {method for route in found for method in route.methods or ()}


# ---- the OpenAPI document


def _body(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _answers(*statuses: int, stream: bool = False, health: bool = False) -> dict[int | str, dict[str, Any]]:
    """What a route may answer besides 200."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses if health else (*statuses, 401, 403, 500):
        schema = {"type": "object"} if health else ERROR
        found[status] = {"description": MEANINGS[status], "content": {"application/json": {"schema": schema}}}
    content = {"application/json": {"schema": {"type": "object"}}} | ({"text/event-stream": {}} if stream else {})
    return found | {200: {"description": "The answer.", "content": content}}


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the schemas of the bodies, which FastAPI does not parse for us."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operation in (one for path in document["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)  # FastAPI's own, for parameters that it would refuse
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas["Error"] = ERROR_SCHEMA
        for model in (CompletionRequest, ChatRequest, LoadAligner, UnloadAligner, Preference, Feedback):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas[model.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema
