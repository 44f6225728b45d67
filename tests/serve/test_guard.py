"""The guard, driven as a server would drive it: nothing gets past it, and nothing that it lets past is delayed."""

import asyncio
import json
import logging
import re

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from trimtab.errors import InvalidOption
from trimtab.serve.guard import Guard

KEYS = ("first-key", "zweiter-schlüssel")


async def echo(scope, receive, send):
    """Answer with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"%d" % length})


class Answer:
    def __init__(self, sent):
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) <= 1
        self.begun = bool(starts)
        self.status = starts[0]["status"] if starts else None
        self.headers = dict(starts[0]["headers"]) if starts else {}
        bodies = [message for message in sent if message["type"] == "http.response.body"]
        self.body = b"".join(message.get("body", b"") for message in bodies)
        self.whole = bool(bodies) and not bodies[-1].get("more_body", False)

    @property
    def error(self):
        assert self.whole
        assert self.headers[b"content-type"] == b"application/json"
        assert int(self.headers[b"content-length"]) == len(self.body)
        return json.loads(self.body)["error"]


def ask(app, path="/v1/models", headers=(), chunks=(b"",), method="POST", root_path="", scope=None):
    """One request; `chunks` is the body as it comes in."""
    incoming = [{"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)} for i, chunk in enumerate(chunks)] + [
        {"type": "http.disconnect"}
    ]
    sent = []

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    if scope is None:
        scope = {}
    scope |= {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "query_string": b"",
        "headers": list(headers),
    }
    asyncio.run(app(scope, receive, send))
    return Answer(sent)


def bearer(value):
    return [(b"authorization", value)]


# ---- keys


@pytest.fixture
def guarded():
    return Guard(echo, keys=KEYS, protected=("/v1", "/admin/"), max_body_bytes=10)


@pytest.mark.parametrize(
    "value", [b"Bearer first-key", b"bearer first-key", b"BEARER  first-key ", "Bearer zweiter-schlüssel".encode()]
)
def test_each_key_opens(guarded, value):
    assert ask(guarded, headers=bearer(value)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(b""),
        bearer(b"Bearer"),
        bearer(b"Bearer "),
        bearer(b"first-key"),
        bearer(b"Basic first-key"),
        bearer(b"Bearer first-ke"),
        bearer(b"Bearer first-key2"),
        bearer(b"Bearer First-Key"),
        bearer(b"Bearer first-key,zweiter"),
        bearer(b"\xff\xfe \xff"),
        bearer(b"Bearer \xff\x80" + b"x" * 10_000),
        bearer("Bearer zweiter-schlüssel".encode("latin-1")),
        bearer(b"Bearer first-key") * 2,
        [(b"x-api-key", b"first-key")],
    ],
)
def test_anything_else_does_not(guarded, headers):
    answer = ask(guarded, headers=headers)
    assert answer.status == 401
    assert answer.headers[b"www-authenticate"] == b"Bearer"
    assert answer.error == {
        "message": "this server needs an API key: send 'Authorization: Bearer KEY' with one of its keys",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


@pytest.mark.parametrize(
    ("path", "root_path", "status"),
    [
        ("/v1", "", 401),
        ("/v1/", "", 401),
        ("/v1/chat/completions", "", 401),
        ("/admin", "", 401),
        ("/admin/x", "", 401),
        ("/v1x", "", 200),
        ("/health", "", 200),
        ("/", "", 200),
        ("/api/v1/models", "/api", 401),
        ("/v1/models", "/api", 401),
        ("/api/health", "/api", 200),
    ],
)
def test_what_needs_a_key(guarded, path, root_path, status):
    assert ask(guarded, path, root_path=root_path).status == status


def test_everything_can_need_a_key():
    assert ask(Guard(echo, keys=KEYS, protected=("/",), max_body_bytes=10), "/health").status == 401


def test_without_keys_everything_is_open():
    assert ask(Guard(echo, max_body_bytes=10)).status == 200


@pytest.mark.parametrize("key", ["", " ", " a", "a\n", "a\x00b"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(InvalidOption, match="an API key must be"):
        Guard(echo, keys=("good", key), max_body_bytes=10)


def test_a_socket_needs_a_key_too(guarded):
    async def app(scope, receive, send):
        await send({"type": "websocket.accept"})

    async def connect(headers):
        sent = []

        async def send(message):
            sent.append(message["type"])

        scope = {"type": "websocket", "path": "/v1/live", "headers": headers}
        await Guard(app, keys=KEYS, max_body_bytes=1)(scope, None, send)
        return sent

    assert asyncio.run(connect([])) == ["websocket.close"]
    assert asyncio.run(connect(bearer(b"Bearer first-key"))) == ["websocket.accept"]


def test_other_protocols_pass_untouched():
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    asyncio.run(Guard(app, keys=KEYS, max_body_bytes=1)({"type": "lifespan"}, "receive", "send"))
    assert seen == [({"type": "lifespan"}, "receive", "send")]


# ---- bodies


def sized(length):
    return [(b"content-length", length)]


TOO_LONG = {
    "message": "the body is longer than the 10 bytes that this server reads",
    "type": "invalid_request_error",
    "param": None,
    "code": "request_too_large",
}


@pytest.fixture
def limited():
    return Guard(echo, max_body_bytes=10)


@pytest.mark.parametrize("headers", [[], sized(b"10"), sized(b"0010"), sized(b"3"), sized(b"10") * 2])
@pytest.mark.parametrize("chunks", [[b"x" * 10], [b"x" * 5] * 2, [b"x"] * 10, [b"", b"xxxxxxxxxx", b""]])
def test_a_body_up_to_the_limit_is_read(limited, headers, chunks):
    assert ask(limited, headers=headers, chunks=chunks).body == b"10"


@pytest.mark.parametrize("length", [b"11", b"9" * 19])
def test_a_declared_length_is_refused_before_anything_is_read(length):
    async def app(scope, receive, send):
        raise AssertionError

    answer = ask(Guard(app, max_body_bytes=10), headers=sized(length))
    assert (answer.status, answer.error) == (413, TOO_LONG)
    assert answer.headers[b"connection"] == b"close"


@pytest.mark.parametrize("headers", [[], sized(b"1"), sized(b"10")])
@pytest.mark.parametrize("chunks", [[b"x" * 11], [b"x"] * 11, [b"x" * 10, b"x", b""]])
def test_a_longer_body_is_refused_whatever_was_declared(limited, headers, chunks):
    answer = ask(limited, headers=headers, chunks=chunks)
    assert (answer.status, answer.error) == (413, TOO_LONG)


@pytest.mark.parametrize("headers", [sized(b) for b in (b"", b"-1", b"+1", b"1.0", b"0x1", b"1,1", b" 1", b"\xff", b"9" * 20)])
def test_a_malformed_length_is_refused(limited, headers):
    answer = ask(limited, headers=headers)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_content_length"


def test_two_lengths_are_refused(limited):
    assert ask(limited, headers=[*sized(b"1"), *sized(b"2")]).status == 400


def test_what_the_application_makes_of_a_cut_body_is_not_sent(caplog):
    """FastAPI answers 400 itself when reading fails; Starlette would send 500."""
    app = FastAPI()

    @app.post("/model")
    async def with_model(body: dict[str, int]):
        raise AssertionError

    @app.post("/bytes")
    async def with_bytes(request: Request):
        await request.body()
        raise AssertionError

    app.add_middleware(Guard, max_body_bytes=10)
    for path in ("/model", "/bytes"):
        answer = ask(app, path, headers=[(b"content-type", b"application/json")], chunks=[b"x" * 6] * 2)
        assert (answer.status, answer.error) == (413, TOO_LONG)
    assert not caplog.records


def test_a_body_too_long_under_an_answer_that_has_begun_cuts_it_short():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        raise AssertionError

    answer = ask(Guard(app, max_body_bytes=10), chunks=[b"x" * 11])
    assert (answer.status, answer.body, answer.whole) == (200, b"", False)


# ---- ids


def test_the_clients_id_is_kept():
    async def app(scope, receive, send):
        assert scope["state"] == {"lifespan": 1, "request_id": "Abc-1._9"}
        await echo(scope, receive, send)

    headers = [(b"X-Request-ID", b"Abc-1._9")]
    answer = ask(Guard(app, max_body_bytes=1), headers=headers, scope={"state": {"lifespan": 1}})
    assert answer.headers[b"x-request-id"] == b"Abc-1._9"


@pytest.mark.parametrize("value", [b"", b"x" * 65, b"a b", b"a\r\nb", b"\xff", "é".encode(), b"<script>", b"a\n"])
def test_an_unsafe_id_is_replaced(limited, value):
    answer = ask(limited, headers=[(b"x-request-id", value)])
    assert re.fullmatch(rb"[0-9a-f]{32}", answer.headers[b"x-request-id"])


def test_ids_are_made_where_there_are_none(limited):
    made = {ask(limited).headers[b"x-request-id"] for _ in range(3)}
    assert len(made) == 3


def test_refusals_have_an_id_too(guarded, limited):
    headers = [(b"x-request-id", b"mine")]
    for answer in (ask(guarded, headers=headers), ask(limited, headers=[*headers, *sized(b"99")])):
        assert answer.headers[b"x-request-id"] == b"mine"


def test_an_answer_has_one_id():
    app = FastAPI()

    @app.get("/own")
    async def own(request: Request):
        return PlainTextResponse(request.state.request_id, headers={"X-Request-ID": "other"})

    app.add_middleware(Guard, max_body_bytes=10)
    answer = ask(app, "/own", headers=[(b"x-request-id", b"mine")], method="GET")
    assert (answer.headers[b"x-request-id"], answer.body) == (b"mine", b"mine")


# ---- failures


def test_an_exception_is_logged_and_answered_without_its_details(caplog):
    app = FastAPI()

    @app.get("/v1/broken\n")
    async def broken():
        raise RuntimeError("the secret")

    app.add_middleware(Guard, max_body_bytes=10)
    answer = ask(app, "/v1/broken\n", headers=[(b"x-request-id", b"mine")], method="GET")
    assert answer.status == 500
    assert answer.error == {
        "message": "the server failed; it has logged why under request mine",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "request mine: GET '/v1/broken\\n' failed"
    assert "the secret" in str(record.exc_info[1])


def test_a_stream_that_fails_is_cut_short(caplog):
    app = FastAPI()

    @app.get("/stream")
    async def stream():
        async def events():
            yield b"data: 1\n\n"
            raise RuntimeError("the secret")

        return StreamingResponse(events())

    app.add_middleware(Guard, max_body_bytes=10)
    answer = ask(app, "/stream", method="GET")
    assert (answer.status, answer.body, answer.whole) == (200, b"data: 1\n\n", False)
    assert len(caplog.records) == 1


def test_a_client_that_goes_away_is_no_failure(caplog):
    app = FastAPI()

    @app.post("/read")
    async def read(request: Request):
        await request.body()

    app.add_middleware(Guard, max_body_bytes=10)
    with caplog.at_level(logging.INFO):
        assert not ask(app, "/read", chunks=()).begun
    assert not caplog.records


def test_a_cancelled_request_stays_cancelled():
    async def app(scope, receive, send):
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        ask(Guard(app, max_body_bytes=10))


def test_a_stream_passes_event_by_event():
    """Each event is out before the next is made."""
    log = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(3):
            log.append(f"made {i}")
            await send({"type": "http.response.body", "body": b"%d" % i, "more_body": True})

    async def send(message):
        log.append(f"sent {message.get('body', b'').decode()}".strip())

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(Guard(app, max_body_bytes=10)(scope, None, send))
    assert log == ["sent", "made 0", "sent 0", "made 1", "sent 1", "made 2", "sent 2"]
