"""A page of another origin cannot use a server, whatever it asks for and however; the operator may let it in."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest
from playwright.sync_api import sync_playwright

from serving import Server, running, table_service
from trimtab.errors import InvalidOption
from trimtab.models.table import TableLM
from trimtab.origins import Origins, is_json

KEY = "a-key"
BODY = {"model": "base", "prompt": "abc", "max_tokens": 2, "seed": 0}
LOCAL = "localhost:8000"


def scope(headers: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "scheme": "http", "method": "POST", "headers": raw, **more}


def code(origins: Origins, *headers: tuple[str, str], **more: Any) -> str | None:
    """Of the refusal; None where there is none."""
    refusal = origins.refusal(scope(list(headers), **more))
    return refusal and refusal[1]


# ---- who is let in


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (LOCAL, "http://localhost:8000"),
        (LOCAL, "HTTP://LocalHost:8000"),
        ("LOCALHOST:8000", "http://localhost:8000"),
        ("localhost", "http://localhost"),
        ("localhost", "http://localhost:80"),
        ("localhost:80", "http://localhost"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[::1]:8000", "http://[0:0:0:0:0:0:0:1]:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
    ],
)
def test_the_servers_own_pages_are_let_in(host, origin):
    assert code(Origins(host="127.0.0.1"), ("Host", host), ("oRIGIN", origin)) is None


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://localhost",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
        "https://localhost:8000",
        "http://localhost:8000.evil.example",
        "http://localhost.evil.example:8000",
        "http://evil.example",
        "http://localhost:8000@evil.example",
        "http://localhost:8000/",
        "http://localhost:8000, http://evil.example",
        "localhost:8000",
        "chrome-extension://abcdef",
        "http://löcalhost:8000",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
def test_any_other_page_is_not(origin, method):
    assert code(Origins(host="127.0.0.1"), ("host", LOCAL), ("origin", origin), method=method) == "origin_not_allowed"


def test_every_one_of_several_headers_counts():
    own, foreign = ("origin", "http://localhost:8000"), ("Origin", "http://evil.example")
    for pair in ((own, foreign), (foreign, own)):
        assert code(Origins(), ("host", LOCAL), *pair) == "origin_not_allowed"
    assert code(Origins(), ("host", "evil.example"), ("host", LOCAL), own) == "origin_not_allowed", "whose is it?"
    assert code(Origins(host="::1"), ("host", LOCAL), ("host", "evil.example")) == "host_not_allowed"


def test_sockets_have_the_pages_scheme():
    assert code(Origins(), ("host", LOCAL), ("origin", f"http://{LOCAL}"), type="websocket", scheme="ws") is None
    assert code(Origins(), ("host", LOCAL), ("origin", f"https://{LOCAL}"), type="websocket", scheme="wss") is None
    assert code(Origins(), ("host", LOCAL), ("origin", f"https://{LOCAL}"), type="websocket", scheme="ws") is not None


@pytest.mark.parametrize(
    ("site", "mode", "method", "refused"),
    [
        ("cross-site", "no-cors", "GET", True),
        ("same-site", "no-cors", "GET", True),
        ("cross-site", "navigate", "GET", False),
        ("cross-site", "navigate", "POST", True),
        ("same-origin", "no-cors", "GET", False),
        ("none", "navigate", "GET", False),
    ],
)
def test_what_a_page_embeds_is_refused_and_what_it_links_to_is_not(site, mode, method, refused):
    """An image or a script of another page has no `Origin`."""
    headers = [("host", LOCAL), ("sec-fetch-site", site), ("sec-fetch-mode", mode)]
    assert code(Origins(), *headers, method=method) == ("origin_not_allowed" if refused else None)


@pytest.mark.parametrize(
    ("allowed", "origin", "let_in"),
    [
        (["https://example.com"], "https://example.com", True),
        (["https://Example.com:443/"], "https://example.com", True),
        (["https://example.com"], "http://example.com", False),
        (["https://example.com"], "https://example.com:8443", False),
        (["https://example.com"], "https://sub.example.com", False),
        (["http://a.example", "http://b.example:3000"], "http://b.example:3000", True),
        (["http://[::1]:3000"], "http://[0:0::1]:3000", True),
        (["chrome-extension://abcdef"], "chrome-extension://abcdef", True),
        (["https://example.com"], "null", False),
        (["*"], "https://anything.example", True),
        (["*"], "null", True),
    ],
)
def test_pages_that_the_operator_names_are_let_in(allowed, origin, let_in):
    assert (code(Origins(allowed), ("host", LOCAL), ("origin", origin)) is None) == let_in


@pytest.mark.parametrize(
    "text", ["", "example.com", "null", "http://", "http://a/b", "http://*.a", "http://a:x", "http://bücher.a"]
)
def test_an_origin_that_no_browser_would_send_is_an_error_at_the_start(text):
    with pytest.raises(InvalidOption, match=r"--allowed_origins must be '\*' or like https://example.com"):
        Origins([text])


# ---- by which name


@pytest.mark.parametrize("name", ["localhost", "LocalHost:1", "127.0.0.1:8000", "127.0.0.2", "[::1]", "[::1]:8000"])
@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_has_its_own_names(name, bound):
    assert code(Origins(host=bound), ("host", name)) is None


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:8000", "localhost.evil.example", "192.168.0.1", "[::2]", "localhost@evil", "", "a b"]
)
def test_another_name_is_a_page_that_points_it_here(name):
    """It would be of the server's own origin otherwise: DNS rebinding."""
    found = code(Origins(["*"], host="127.0.0.1"), ("host", name), ("origin", f"http://{name}"))
    assert found == "host_not_allowed"


def test_the_operator_names_hosts():
    assert code(Origins(host="127.0.0.1", hosts=["Example.com"]), ("host", "example.COM:8443")) is None
    assert code(Origins(host="127.0.0.1", hosts=["*"]), ("host", "evil.example")) is None
    assert code(Origins(host="0.0.0.0"), ("host", "anything.example")) is None, "its names are not known"
    served = Origins(host="192.168.0.5", hosts=["example.com"])
    for name, known in (("example.com", True), ("192.168.0.5:8000", True), ("localhost", True), ("evil.example", False)):
        assert (code(served, ("host", name)) is None) == known
    with pytest.raises(InvalidOption, match="--allowed_hosts must be"):
        Origins(hosts=["http://example.com"])


# ---- what a body is


@pytest.mark.parametrize(
    "kind",
    [
        b"application/json",
        b"Application/JSON",
        b"application/json; charset=utf-8",
        b"application/json;charset=UTF-8",
        b" application/json ",
        b"application/vnd.api+json",
        b"application/problem+json; x=y",
    ],
)
def test_json_has_many_names(kind):
    assert is_json([kind])


@pytest.mark.parametrize(
    "kinds",
    [
        [],
        [b""],
        [b"text/plain"],
        [b"text/plain; application/json"],
        [b"text/json"],
        [b"application/x-www-form-urlencoded"],
        [b"multipart/form-data; boundary=application/json"],
        [b"application/json, text/plain"],
        [b"application/jsonx"],
        [b"application/+json"],
        [b"text/plain", b"application/json"],
        [b"application/json", b"text/plain"],
    ],
)
def test_other_bodies_are_not_json(kinds):
    assert not is_json(kinds)


# ---- over HTTP

TABLES = [TableLM.random(7, order=2, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def other_page() -> Iterator[str]:
    """The origin of another server's page: another port is another origin."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>other</title>")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def closed() -> Iterator[Server]:
    """Without a key, as on a laptop."""
    with running(table_service(TABLES, origins=Origins(host="127.0.0.1"))) as server:
        yield server


@pytest.fixture(scope="module")
def opened(other_page: str) -> Iterator[Server]:
    """For one other page, with a key."""
    with running(table_service(TABLES, origins=Origins([other_page], host="127.0.0.1"), api_keys=(KEY,))) as server:
        yield server


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/docs", "/none"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_no_route_is_open_to_other_pages(closed, method, path):
    answer = closed.client.request(method, path, headers={"origin": "http://evil.example", "x-request-id": "mine"})
    assert answer.status_code == 403
    assert (answer.headers["x-request-id"], answer.headers["vary"]) == ("mine", "Origin")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.json()["error"] == {
        "message": "pages of 'http://evil.example' may not use this server: "
        "start the server with --allowed_origins to let them in",
        "type": "invalid_request_error",
        "param": None,
        "code": "origin_not_allowed",
    }


def test_a_foreign_name_is_refused_over_http(closed):
    answer = closed.client.get("/v1/models", headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_must_be_said_to_be_json(closed, kind, chunked):
    body = json.dumps(BODY).encode()
    content = iter([body[:9], body[9:]]) if chunked else body
    answer = closed.client.post("/v1/completions", content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert "-H 'Content-Type: application/json'" in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsupported_media_type")


def test_json_by_another_name_is_json_and_no_body_is_said_to_be_none(closed):
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json"):
        answer = closed.client.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
        assert answer.status_code == 200
    answer = closed.client.post("/v1/completions")
    assert (answer.status_code, answer.json()["error"]["message"][:24]) == (400, "the body is not JSON: EO")


def test_an_allowed_page_can_read_every_refusal(opened, other_page):
    page, key = {"origin": other_page}, {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=opened.url) as client:
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}
        asked = client.options("/v1/completions", headers=page | preflight)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, other_page)
        assert asked.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        assert "POST" in asked.headers["access-control-allow-methods"]
        answers = {
            401: client.post("/v1/completions", json=BODY, headers=page),
            200: client.post("/v1/completions", json=BODY, headers=page | key),
            400: client.post("/v1/completions", json={}, headers=page | key),
            404: client.get("/v1/models/none", headers=page | key),
            405: client.get("/v1/completions", headers=page | key),
            413: client.post("/v1/completions", content=b" " * 2**21, headers=page | key),
            415: client.post("/v1/completions", content=b"{}", headers=page | key),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == other_page
            assert "Origin" in answer.headers["vary"]
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert client.options("/v1/completions", headers={"origin": "http://evil.example"} | preflight).status_code == 403
        plain = client.post("/v1/completions", json=BODY, headers=key)
        assert (plain.status_code, plain.headers["vary"]) == (200, "Origin")
        assert "access-control-allow-origin" not in plain.headers


def test_openais_client_has_no_origin(opened):
    with openai.OpenAI(base_url=f"{opened.url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.completions.create(**BODY).usage.completion_tokens <= 2


# ---- in a browser


@pytest.fixture(scope="module")
def page(other_page):
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "these tests drive a real browser: install chromium (apt install chromium)"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(other_page)
        yield page
        browser.close()


FETCH = """async ([url, options]) => {
    try {
        const answer = await fetch(url, options)
        return [answer.type, answer.status, await answer.text(), answer.headers.get('x-request-id')]
    } catch (error) { return ['failed', 0, '', null] }
}"""

FORM = """url => {
    const form = document.createElement('form')
    Object.assign(form, {method: 'post', action: url})
    document.body.append(form)
    form.submit()
}"""


def fetch(page, server, path="/v1/completions", **options):
    return page.evaluate(FETCH, [f"{server.url}{path}", options])


def tokens_of(server) -> float:
    return server.metric("trimtab:generation_tokens_total", model_name="base")


def test_another_page_makes_no_server_work(page, closed):
    closed.complete(**BODY)
    before = tokens_of(closed)
    for kind in ("text/plain", "application/json", "application/x-www-form-urlencoded"):
        for mode in ("cors", "no-cors"):
            sent = {"method": "POST", "body": json.dumps(BODY), "headers": {"content-type": kind}, "mode": mode}
            assert fetch(page, closed, **sent)[:3] in (["failed", 0, ""], ["opaque", 0, ""])
    assert fetch(page, closed, "/v1/models")[0] == "failed"
    with page.expect_navigation():
        page.evaluate(FORM, f"{closed.url}/v1/completions")
    assert "origin_not_allowed" in page.content()
    page.go_back()
    assert tokens_of(closed) == before


def test_a_page_that_is_allowed_asks_and_streams_with_the_key(page, opened):
    sent = {"method": "POST", "body": json.dumps(BODY), "headers": {"content-type": "application/json"}}
    kind, status, text, _ = fetch(page, opened, **sent)
    assert (kind, status, json.loads(text)["error"]["code"]) == ("cors", 401, "invalid_api_key")
    sent["headers"]["authorization"] = f"Bearer {KEY}"
    kind, status, text, request_id = fetch(page, opened, **sent)
    assert (kind, status) == ("cors", 200)
    assert json.loads(text)["choices"][0]["text"] == opened.complete(**BODY)["choices"][0]["text"]
    assert len(request_id) == 32
    kind, status, text, _ = fetch(page, opened, **{**sent, "body": json.dumps(BODY | {"stream": True})})
    assert (kind, status) == ("cors", 200)
    assert text.rstrip().endswith("data: [DONE]")


def test_a_name_that_a_page_points_here_is_refused(closed):
    """The page's name resolves to this machine: the browser sees one origin."""
    port = int(closed.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        host = f"evil.example:{port}"
        raw.sendall(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 403 ")
