"""An endpoint for tests: an HTTP server in a thread that answers as it is told, and remembers what it was asked."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class Reply:
    """One answer: JSON, unless there is a text; or none, where the connection is dropped."""

    body: Any = None
    status: int = 200
    text: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False


@dataclass
class Asked:
    """One request."""

    path: str
    body: Any
    headers: dict[str, str]
    time: float


class Scripted:
    """What it was asked so far, and how much of it at once."""

    def __init__(self, respond: Callable[[Asked, int], Reply], models: list[dict[str, Any]] | None) -> None:
        self.asked: list[Asked] = []
        self.in_flight = self.most_in_flight = 0
        self._respond, self._models, self._lock = respond, models, threading.Lock()
        self.url = ""

    def posts(self) -> list[Any]:
        """The bodies that were posted."""
        return [asked.body for asked in self.asked]

    def answer(self, path: str, body: Any, headers: dict[str, str]) -> Reply:
        """The scripted answer; listing models is no part of the script."""
        if path == "/v1/models":
            return Reply({"data": self._models}) if self._models is not None else Reply({"detail": "Not Found"}, status=404)
        with self._lock:
            asked = Asked(path, body, headers, time.monotonic())
            number = len(self.asked)
            self.asked.append(asked)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self._respond(asked, number)
            time.sleep(reply.delay)
            return reply
        finally:
            with self._lock:
                self.in_flight -= 1


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


@contextlib.contextmanager
def scripted(
    respond: Callable[[Asked, int], Reply], *, models: list[dict[str, Any]] | None = None, port: int = 0
) -> Iterator[Scripted]:
    """Answer until the block ends; `respond` gets the request and its number."""
    script = Scripted(respond, models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet for an answer: two would wait for each other, 40 ms each time

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = script.answer(self.path, json.loads(data) if data else None, headers)
            if reply.drop:
                self.close_connection = True
                return
            content = (json.dumps(reply.body) if reply.text is None else reply.text).encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Silence."""

    server = _Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def prompt_logprobs(model: Any, ids: list[int], k: int) -> list[dict[str, dict[str, Any]] | None]:
    """What vLLM says of a prompt: for each token but the first, the k best (−1: all) and the token that stands there."""
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for row, token in zip(rows, ids[1:], strict=False):
        best = row.topk(len(row) if k == -1 else k).indices.tolist()
        names = dict.fromkeys([token, *best])  # vLLM puts the token's own entry first
        ranks = {name: 1 + int((row > row[name]).sum()) for name in names}
        entries = ((name, max(float(row[name]), -9999.0)) for name in names)
        found.append({str(name): {"logprob": logp, "rank": ranks[name], "decoded_token": "x"} for name, logp in entries})
    return found


def scoring(model: Any, *, most: int = 1000) -> Callable[[Asked, int], Reply]:
    """Answers as vLLM does to `prompt_logprobs`, of which it gives `most` at the most."""

    def respond(asked: Asked, number: int) -> Reply:
        body = asked.body
        assert asked.path == "/v1/completions"
        assert body["max_tokens"] == 1
        if body["prompt_logprobs"] > most:
            message = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: {most}"
            return Reply({"error": {"message": message, "type": "BadRequestError", "code": 400}}, status=400)
        entries = prompt_logprobs(model, body["prompt"], body["prompt_logprobs"])
        return Reply({"choices": [{"index": 0, "text": "x", "prompt_logprobs": entries}]}, delay=0.02 * (number % 3))

    return respond
