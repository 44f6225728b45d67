"""The playground in a real browser, over a real server, for tests."""

import asyncio
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import httpx
import uvicorn
from PIL import Image
from playwright.sync_api import expect

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.assemble import Loader
from trimtab.decode.engine import Engine
from trimtab.serve.app import make_app
from trimtab.serve.playground.page import add_playground
from trimtab.serve.registry import Registry
from trimtab.serve.service import Opened, Service, Settings

LETTERS = "abcdefghijklmnop u<>&\"'/=${}`\n"
"""What the tiny models write looks like HTML and like templates at every turn."""
PHONE, DESKTOP = (390, 844), (1280, 800)
TOKENS = 40


class Server:
    """A server in a thread.

    Args:
        folder: of the models' folders, the proposal's among them.
        votes: the arena's file.
        aligners: the names of their folders, and their own.
        keys: of the API.
        loaded: whether to load the models at once.

    Attributes:
        step_seconds: what each step of the engine takes at least.
        may_load: the models are loaded once it is set.
    """

    def __init__(self, folder, votes, aligners, *, keys=(), loaded=True):
        self.folder, self.votes, self.aligners, self.step_seconds = folder, votes, aligners, 0.0
        self.may_load = threading.Event()
        if loaded:
            self.may_load.set()
        self.service = Service(Settings(name="base", api_keys=keys), self._load)
        app = make_app(self.service)

        async def add():
            add_playground(app, self.service, votes=votes)

        in_thread(lambda: asyncio.run(add()))  # outside of a loop, Gradio would leave several of its own open
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=20))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def start(self):
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        if self.may_load.is_set():
            wait_for(lambda: self.service.state != "loading")
            assert self.service.state == "ready", self.service.failure
        return self

    def stop(self):
        """As run_server does on SIGTERM; how long it took."""
        began = time.monotonic()
        self.may_load.set()
        self.service.drain()
        self._server.should_exit = True
        self._thread.join(30)
        return time.monotonic() - began

    def complete(self, **body):
        """What the API says to the same request."""
        answer = httpx.post(
            f"{self.url}/v1/completions", json={"model": "base", "max_tokens": TOKENS, "temperature": 0.7, **body}
        )
        return answer.json()["choices"][0]["text"]

    def _load(self):
        self.may_load.wait(60)
        opened = open_models(self.folder, self.aligners)
        step = opened.engine.step

        def slow_step():
            time.sleep(self.step_seconds)
            return step()

        opened.engine.step = slow_step
        return opened


class Table:
    """A service and one of its tabs, in one event loop.

    Args:
        folder: of the models' folders.
        aligners: the names of those that are loaded.
        make: makes the tab.
    """

    def __init__(self, folder, aligners, make):
        self.runner = asyncio.Runner()
        self.service = Service(Settings(name="base"), lambda: open_models(folder, aligners))
        self.runner.run(self._open(make))

    async def _open(self, make):
        await self.service.open()
        with gr.Blocks(analytics_enabled=False):
            self.tab = make(self.service)

    def close(self):
        self.runner.run(self.service.close())
        self.runner.close()


def open_models(folder, aligners):
    """The proposal and the aligners of a folder, whose texts never end by themselves."""
    base = AlignedModel.from_pretrained(str(folder / "proposal"), eos_token_ids=[], max_num_seqs=8)
    registry = Registry(base, Loader(base.tokenizer, dtype="auto", device=None))
    for name in aligners:
        registry.load(name, str(folder / name))
    return Opened(registry, Engine(base.proposal, base.pace, max_num_seqs=8, log_z_every=1))


def in_thread(work):
    """Run something where the browser's driver has no loop of its own."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def visit(browser, server, size=DESKTOP, *, expect_errors=False, **settings):
    """A page whose console stays clean, and which asks nobody but the server."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
    page = context.new_page()
    page.set_default_timeout(8_000)
    expect.set_options(timeout=8_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/playground")
    yield page
    foreign = [url for url in asked if not url.startswith((server.url + "/", "data:", "blob:"))]
    assert foreign == []
    assert expect_errors or said == []
    context.close()


def ask(page, text, *, button="Compare", tokens=TOKENS, seed=None, sampling=True):
    """Fill in the tab that is open, and run it."""
    page.get_by_role("textbox", name="Prompt", exact=True).fill(text)
    if sampling:
        page.get_by_role("button", name="Sampling: temperature, length, seed").click()
        number, slider = (page.get_by_role(role, name="Most tokens") for role in ("spinbutton", "slider"))

        def noticed():
            number.fill(str(tokens))
            number.blur()
            return slider.input_value() == str(tokens)

        wait_for(noticed)  # what is typed before Gradio has brought the field to life is lost
        if seed is not None:
            field = page.get_by_role("spinbutton", name="Seed, the same on both sides")
            field.fill(str(seed))
            field.blur()
    page.get_by_role("button", name=button, exact=True).click()


def text_of(page, selector):
    """The text of an answer, without marks, cards and special tokens."""
    return page.locator(f"{selector} .tt-tokens").evaluate(
        "e => { e = e.cloneNode(true); e.querySelectorAll('.tt-mark, .tt-card, .tt-special').forEach(m => m.remove());"
        " return e.textContent }"
    )


def point_at(page, token, *, touch=False):
    """With the pointer itself: the driver's own `hover` goes for the hidden button in the label."""
    token.scroll_into_view_if_needed()
    box = token.bounding_box()
    act = page.touchscreen.tap if touch else page.mouse.move
    act(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def inside(page, card):
    box, size = card.bounding_box(), page.viewport_size
    assert box["x"] >= 0
    assert box["y"] >= 0
    assert box["x"] + box["width"] <= size["width"]
    assert box["y"] + box["height"] <= size["height"]


def check_picture(page, path: Path, scheme):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(2**24)
    assert len(colours) > 50
    assert (sum(max(colours)[1]) > 600) == (scheme == "light")
