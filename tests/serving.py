"""A real server in a thread, for tests: uvicorn on a free port around tiny models."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tiny import EOS, tiny_tokenizer
from trimtab import AlignedModel
from trimtab.decode.assemble import Loaded, Loader
from trimtab.decode.engine import Engine
from trimtab.models.table import TableLM
from trimtab.serve.app import make_app
from trimtab.serve.registry import Entry, Registry
from trimtab.serve.service import Opened, Service, Settings

LETTERS = "abcdef"
"""`<eos>` and these are the vocabulary of `table_server`: seven tokens."""


@dataclass
class Server:
    """Where it is, and what is inside."""

    url: str
    service: Service
    client: httpx.Client

    def post(self, route: str, /, **body: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(route, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        answer = self.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def metric(self, name: str, **labels: str) -> float:
        """The value of one line of /metrics."""
        wanted = name + ("{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}" if labels else "")
        for line in self.client.get("/metrics").text.splitlines():
            if line.rpartition(" ")[0] == wanted:
                return float(line.rpartition(" ")[2])
        raise KeyError(wanted)

    def idle(self, seconds: float = 10.0) -> bool:
        """Wait until no sequence is left in the engine; whether that came about."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.service.worker.outstanding == 0 and len(self.service.worker.engine) == 0:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(service: Service, extend: Callable[[Any], None] = lambda app: None, wait: bool = True) -> Iterator[Server]:
    """Serve it until the block ends; `extend` may add to the application."""
    app = make_app(service)
    extend(app)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    headers = {"authorization": f"Bearer {service.settings.api_keys[0]}"} if service.settings.api_keys else {}
    with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
        deadline = time.monotonic() + 60
        while wait and service.state == "loading" and time.monotonic() < deadline:
            time.sleep(0.01)
        while not server.started:
            time.sleep(0.01)
        yield Server(url, service, client)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive(), "the server does not stop"


def folder_service(
    proposal: Path, aligners: dict[str, Path], *, engine: dict[str, Any] | None = None, **settings: Any
) -> Service:
    """A service over folders; `registry_*` settings go to the registry."""
    for_registry = {k.removeprefix("registry_"): settings.pop(k) for k in list(settings) if k.startswith("registry_")}

    def load() -> Opened:
        base = AlignedModel.from_pretrained(proposal)
        registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"), **for_registry)
        for name, path in aligners.items():
            registry.load(name, str(path), pinned=True)
        return Opened(registry, Engine(base.proposal, base.pace, prefixes=base.prefixes, log_z_every=1, **(engine or {})))

    return Service(Settings("base", stream_interval=0.0, **settings), load)


def table_service(
    tables: list[TableLM], *, tokenizer: Any = None, engine: dict[str, Any] | None = None, **settings: Any
) -> Service:
    """A service over tables: the first is the proposal, the others are aligners called q0, q1, …"""
    base = AlignedModel(tables[0], tokenizer=tokenizer or tiny_tokenizer(LETTERS), eos_token_ids=[EOS])

    def load() -> Opened:
        registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"))
        for i, table in enumerate(tables[1:]):
            registry._entries[f"q{i}"] = Entry(f"q{i}", "", pinned=True, loaded=Loaded(table, None, 0))
        return Opened(registry, Engine(base.proposal, base.pace, prefixes=base.prefixes, log_z_every=1, **(engine or {})))

    return Service(dataclasses.replace(Settings("base", stream_interval=0.0), **settings), load)
