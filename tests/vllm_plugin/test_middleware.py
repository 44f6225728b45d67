"""Aligners by name in front of vLLM's server: an application that echoes what it gets stands for vLLM's."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from trimtab.vllm.middleware import HOSTS_VARIABLE, AlignerNames, AllowedPages, translate
from trimtab.vllm.settings import Settings

CONFIG = {"trimtab": {"aligners": {"docs": "path/docs", "terse": {"path": "path/terse", "weight": 0.5}}}}
SETTINGS = Settings({"docs": "path/docs", "terse": "path/terse"}, {"terse": 0.5})
JSON = {"content-type": "application/json"}
HEADERS = [(b"content-type", b"application/json")]
BASES = ["base", "org/base"]


async def echo(request: Request) -> Response:
    body = await request.body()
    seen = {"body": body.decode("latin-1"), "length": request.headers.get("content-length"), "path": request.url.path}
    return JSONResponse(seen, headers={"x-seen": request.headers.get("x-sent", "")})


async def models(request: Request) -> Response:
    if "authorization" not in request.headers:
        return JSONResponse({"error": "Unauthorized"}, status_code=401)
    return JSONResponse({"object": "list", "data": [{"id": "base"}]}, headers={"x-seen": "yes"})


def make_app(
    config: Any = CONFIG,
    served: list[str] | None = BASES,
    api_key: list[str] | None = None,
    host: str = "127.0.0.1",
    allowed_origins: tuple[str, ...] = (),
) -> Starlette:
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/api/v1/completions"]
    routes = [Route(path, echo, methods=["POST", "GET"]) for path in paths]
    app = Starlette(routes=[*routes, Route("/v1/models", models, methods=["GET", "POST"])])
    app.state.args = SimpleNamespace(
        served_model_name=served, model="folder/base", api_key=api_key, host=host, allowed_origins=list(allowed_origins)
    )
    app.state.vllm_config = SimpleNamespace(additional_config=config)
    app.add_middleware(AlignerNames)
    return app


def ask(app: Any, method: str, path: str, root_path: str = "", **more: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


def passed_on(body: Any, path: str = "/v1/completions", app: Any = None, **more: Any) -> Any:
    """What reaches the application."""
    answer = ask(app or make_app(), "POST", path, json=body, **more)
    assert answer.status_code == 200, answer.text
    seen = answer.json()
    assert int(seen["length"]) == len(seen["body"])
    return json.loads(seen["body"])


# ---- requests


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_reaches_vllm_in_its_own_words(path):
    body = {"model": "docs", "prompt": "é", "weight": 0.5, "rule": "geometric", "temperature": 0, "proposal_top_p": 0.9}
    xargs = {"aligner": "docs", "weight": 0.5, "rule": "geometric", "proposal_top_p": 0.9}
    assert passed_on(body, path) == {"model": "base", "prompt": "é", "temperature": 0, "vllm_xargs": xargs}


MOVED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model": "docs"}, {"model": "base", "vllm_xargs": {"aligner": "docs"}}),
    ({"model": "base:docs"}, {"model": "base", "vllm_xargs": {"aligner": "docs"}}),
    ({"model": "org/base:terse"}, {"model": "base", "vllm_xargs": {"aligner": "terse"}}),
    ({"model": "base", "aligner": "docs"}, {"model": "base", "vllm_xargs": {"aligner": "docs"}}),
    ({"model": "org/base", "aligner": ["docs", "terse"]}, {"model": "org/base", "vllm_xargs": {"aligner": ["docs", "terse"]}}),
    ({"aligner": "docs"}, {"vllm_xargs": {"aligner": "docs"}}),
    ({"model": "base", "aligner": []}, {"model": "base", "vllm_xargs": {"aligner": []}}),
    ({"model": "base", "weight": 0}, {"model": "base", "vllm_xargs": {"weight": 0}}),
    (
        {"model": "base", "aligner": {"docs": 0.7, "terse": -0.3}, "blend": "weights"},
        {"model": "base", "vllm_xargs": {"aligner": ["docs", "terse"], "weight": [0.7, -0.3], "blend": "weights"}},
    ),
    ({"model": "docs", "weight": None, "rule": None}, {"model": "base", "vllm_xargs": {"aligner": "docs"}}),
    ({"model": "docs", "vllm_xargs": None}, {"model": "base", "vllm_xargs": {"aligner": "docs"}}),
    ({"model": "docs", "vllm_xargs": {"weight": 2}}, {"model": "base", "vllm_xargs": {"weight": 2, "aligner": "docs"}}),
    (
        {"model": "docs", "aligner_temperature": 2},
        {"model": "base", "vllm_xargs": {"aligner": "docs", "aligner_temperature": 2}},
    ),
]


@pytest.mark.parametrize(("body", "expected"), MOVED)
def test_names_and_fields_are_moved(body, expected):
    given = json.dumps(body)
    assert translate(body, BASES, SETTINGS) == expected
    assert json.dumps(body) == given, "the request itself stays as it is"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "base", "prompt": "x"},
        {"model": "base", "vllm_xargs": {"aligner": "docs", "weight": 1}},
        {"model": "unknown"},
        {"model": "unknown:docs"},
        {"model": "base:unknown"},
        {"model": "base:"},
        {"model": ":docs"},
        {"model": 3},
        {"model": None},
        {"model": "base", "aligner": None},
    ],
)
def test_what_vllm_understands_by_itself_or_must_refuse_is_left_alone(body):
    assert translate(body, BASES, SETTINGS) is body


def test_a_base_with_a_colon_and_one_that_is_called_like_an_aligner():
    assert translate({"model": "m:8b:docs"}, ["m:8b"], SETTINGS) == {"model": "m:8b", "vllm_xargs": {"aligner": "docs"}}
    assert translate({"model": "m:8b"}, ["m:8b"], SETTINGS) == {"model": "m:8b"}
    assert translate({"model": "docs"}, ["docs"], SETTINGS) == {"model": "docs"}


def test_without_aligners_only_fields_are_moved():
    assert translate({"model": "base:docs"}, BASES, None) == {"model": "base:docs"}
    assert translate({"model": "base", "weight": 1}, BASES, None) == {"model": "base", "vllm_xargs": {"weight": 1}}
    assert passed_on({"model": "docs"}, app=make_app(config={})) == {"model": "docs"}


def test_without_a_served_name_the_base_is_the_model():
    app = make_app(served=None)
    assert passed_on({"model": "folder/base:docs"}, app=app) == {"model": "folder/base", "vllm_xargs": {"aligner": "docs"}}


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"model": "docs", "aligner": "terse"}, "aligner", "the model 'docs' names an aligner; name the base, base,"),
        ({"model": "base:docs", "aligner": "docs"}, "aligner", "the model 'base:docs' names an aligner"),
        ({"model": "docs", "vllm_xargs": {"aligner": "docs"}}, "aligner", "aligner is given twice, in vllm_xargs and outside"),
        ({"model": "base", "weight": 1, "vllm_xargs": {"weight": 1}}, "weight", "weight is given twice"),
        (
            {"model": "base", "aligner_temperature": 1, "vllm_xargs": {"aligner_temperature": 2}},
            "aligner_temperature",
            "aligner_temperature is given twice",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_as_vllm_would(body, field, says):
    answer = ask(make_app(), "POST", "/v1/completions", json=body)
    assert answer.status_code == 400
    assert int(answer.headers["content-length"]) == len(answer.content)
    error = answer.json()["error"]
    assert says in error.pop("message")
    assert error == {"type": "BadRequestError", "param": field, "code": 400}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"no json",
        b'{"model": "docs"',
        b'{"model": "\xff"}',
        b"[1, 2]",
        b'"docs"',
        b"null",
        b"[" * 200_000,
        b'{ "model":"base", "seed":1e400, "x":1.10, "x":2 }',
    ],
)
def test_what_is_no_request_of_ours_passes_byte_for_byte(body):
    answer = ask(make_app(), "POST", "/v1/completions", content=body, headers={"x-sent": "ours", **JSON})
    assert answer.status_code == 200
    assert answer.json()["body"].encode("latin-1") == body
    assert answer.headers["x-seen"] == "ours"


def test_a_body_in_many_pieces_is_one_body():
    async def pieces() -> Any:
        for piece in (b'{"mod', b'el": "do', b"", b'cs"}'):
            yield piece

    answer = ask(make_app(), "POST", "/v1/completions", content=pieces(), headers=JSON)
    assert json.loads(answer.json()["body"]) == {"model": "base", "vllm_xargs": {"aligner": "docs"}}


def test_a_root_path_that_a_proxy_left_in_the_path_does_not_matter():
    body = {"model": "docs"}
    seen = passed_on(body, "/api/v1/completions", root_path="/api")
    assert seen == {"model": "base", "vllm_xargs": {"aligner": "docs"}}
    assert passed_on(body, "/v1/completions", root_path="/api") == seen
    assert passed_on(body, "/api/v1/completions") == body


# ---- models


def test_models_lists_the_aligners():
    answer = ask(make_app(), "GET", "/v1/models", headers={"authorization": "Bearer k"})
    base, *cards = answer.json()["data"]
    assert base == {"id": "base"}
    assert answer.json()["object"] == "list"
    assert answer.headers["x-seen"] == "yes"
    assert int(answer.headers["content-length"]) == len(answer.content)
    for card, (name, path) in zip(cards, SETTINGS.aligners.items(), strict=True):
        assert card.pop("created") > 1.7e9
        assert card == {"id": name, "object": "model", "owned_by": "trimtab", "root": path, "parent": "base"}


def test_without_aligners_models_is_what_it_was():
    answer = ask(make_app(config=None), "GET", "/v1/models", headers={"authorization": "Bearer k"})
    assert answer.json() == {"object": "list", "data": [{"id": "base"}]}


def test_who_may_not_see_models_sees_no_aligners():
    answer = ask(make_app(), "GET", "/v1/models")
    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


# ---- whatever else


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/embeddings"), ("GET", "/v1/completions"), ("POST", "/v1/completions/"), ("POST", "/nowhere")],
)
def test_other_requests_pass(method, path):
    bare = make_app()
    bare.user_middleware.clear()
    body = b'{"model": "docs"}'
    ours, theirs = (ask(app, method, path, content=body) for app in (make_app(), bare))
    assert (ours.status_code, ours.content, ours.headers) == (theirs.status_code, theirs.content, theirs.headers)


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_scopes_pass_as_they_are(kind):
    seen: list[Any] = []

    async def app(*args: Any) -> None:
        seen.extend(args)

    given = {"type": kind, "path": "/v1/completions"}, object(), object()
    asyncio.run(AlignerNames(app)(*given))  # type: ignore[arg-type]
    assert all(one is other for one, other in zip(seen, given, strict=True))


def play(messages: list[dict[str, Any]], app: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the middleware by hand; what is left of the client's messages, and what was sent."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": HEADERS, "app": make_app()}
    asyncio.run(AlignerNames(app)(scope, receive, send))
    return messages, sent


def test_a_client_that_leaves_while_it_is_answered_is_seen():
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    request = {"type": "http.request", "body": b"{}", "more_body": False}
    left, _ = play([dict(request), {"type": "http.disconnect"}], app)
    assert left == []
    assert seen == [request, {"type": "http.disconnect"}]


def test_a_client_that_leaves_before_its_body_ends_is_not_answered():
    async def app(*args: Any) -> None:
        raise AssertionError("there is no request")

    cut = {"type": "http.request", "body": b'{"model": "docs"}', "more_body": True}
    assert play([cut, {"type": "http.disconnect"}], app) == ([], [])


@pytest.mark.parametrize("variable", [False, True])
def test_what_comes_without_vllms_key_is_not_even_read(variable, monkeypatch):
    if variable:
        monkeypatch.setenv("VLLM_API_KEY", "sesame")
    app = make_app(api_key=None if variable else ["other", "sesame"])
    clash = {"model": "docs", "aligner": "terse"}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
        answer = ask(app, "POST", "/v1/completions", json=clash, headers=headers)
        assert json.loads(answer.json()["body"]) == clash, "as it came, for vLLM to refuse"
    for scheme in ("Bearer", "bearer"):  # vLLM takes either
        answer = ask(app, "POST", "/v1/completions", json=clash, headers={"authorization": f"{scheme} sesame"})
        assert answer.status_code == 400
    assert ask(app, "POST", "/invocations", json=clash).status_code == 400, "vLLM wants no key there"


# ---- pages of other origins


def visit(method: str = "POST", path: str = "/v1/completions", app: Any = None, **headers: str) -> httpx.Response:
    """What a page, or a client, gets; `allowed` names the origins that may come in."""
    app = app or make_app()
    app.add_middleware(AllowedPages)
    given = {"host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return ask(app, method, path, json={"model": "docs"}, headers=given)


def test_a_page_of_another_origin_is_kept_out_of_every_route():
    for path in ("/v1/completions", "/v1/models", "/v1/embeddings", "/nowhere"):
        for method in ("GET", "POST", "OPTIONS"):
            answer = visit(method, path, origin="https://evil.example")
            assert answer.status_code == 403
            error = answer.json()["error"]
            assert "pages of 'https://evil.example' may not use this server" in error.pop("message")
            assert error == {"type": "ForbiddenError", "param": None, "code": 403}


def test_a_page_that_is_allowed_reads_answers_and_refusals():
    allowed = ("http://localhost:3000",)
    app, page = make_app(api_key=["sesame"], allowed_origins=allowed), {"origin": allowed[0]}
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    preflight = visit("OPTIONS", app=app, **page, **asked)
    assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (200, "authorization")
    app = make_app(allowed_origins=allowed)
    wrong = {"model": "docs", "aligner": "terse"}
    app.add_middleware(AllowedPages)
    for body, status in (({"model": "docs"}, 200), (wrong, 400)):
        answer = ask(app, "POST", "/v1/completions", json=body, headers={"host": "localhost", **page})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, allowed[0])


def test_a_foreign_name_is_refused_unless_the_environment_names_it(monkeypatch):
    assert visit(host="evil.example").status_code == 403
    assert visit(host="evil.example", app=make_app(host="0.0.0.0")).status_code == 200
    monkeypatch.setenv(HOSTS_VARIABLE, "other.example good.example")
    assert visit(host="good.example:8000").status_code == 200


def test_a_socket_of_a_foreign_page_is_closed():
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def refuse(*_: Any) -> None:
        raise AssertionError("it got through")

    headers = [(b"host", b"localhost"), (b"origin", b"https://evil.example")]
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers, "app": make_app()}
    asyncio.run(AllowedPages(refuse)(scope, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None])
def test_a_body_that_is_not_said_to_be_json_is_refused(kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = ask(make_app(), "POST", "/v1/completions", content=b'{"model": "docs"}', headers=headers)
    assert answer.status_code == 415
    assert "'Content-Type: application/json'" in answer.json()["error"]["message"]
