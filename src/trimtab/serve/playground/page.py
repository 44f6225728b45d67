"""The playground at `/playground`: proposal and aligned side by side, a dial between two aligners, weights that choices steer,
and a blind arena.

The arena's votes train an aligner. A Gradio app on the server's own FastAPI app. Its handlers run in the server's event loop
and use the `Service` as the routes do.

    page                   looks, login, and what happens when it loads or the server stops
    compare, dial, steer, arena   its tabs, controls and handlers
    tab                    what the tabs have in common
    duel                   answers that grow side by side; knows no Gradio
    tokens_html            what is shown of them; knows nothing else
"""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.themes.utils import colors, sizes
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount

from trimtab.serve.playground.arena import Arena
from trimtab.serve.playground.compare import Compare
from trimtab.serve.playground.dial import RELEASE_BY_KEY, Dial
from trimtab.serve.playground.steer import Steer
from trimtab.serve.playground.tab import Update, add_html
from trimtab.serve.playground.tokens_html import notice_html
from trimtab.serve.playground.votes import VoteBook
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service

__all__ = ["PATH", "add_playground"]

PATH = "/playground"
STYLE = Path(__file__).with_name("playground.css")
HEADER = (
    '<header class="tt-head"><h1>Trimtab</h1>'
    "<p>See what a small aligner does to a frozen model: the same prompt, the same seed, token by token.</p></header>"
)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="4" fill="#2563c8"/>'
    '<path d="M4 5h8M8 5v7" stroke="#fff" stroke-width="2"/></svg>'
)
LOGIN = "Any user name, and one of the server's API keys as the password."
LOOK_SECONDS = 0.5
"""How often it is looked whether models are loaded, or the server stops."""


def add_playground(app: FastAPI, service: Service, *, votes: Path) -> None:
    """Show the playground on an application.

    Args:
        app: from `make_app`.
        service: the application's.
        votes: where the arena keeps its votes.

    Raises:
        InvalidOption: `votes` cannot be a file of votes.
    """
    blocks = _page(service, VoteBook(votes))
    blocks.queue(default_concurrency_limit=None, api_open=False)
    gr.mount_gradio_app(
        app,
        blocks,
        PATH,
        footer_links=[],
        run_history=False,
        auth=_check_key(service.settings.api_keys) if service.settings.api_keys else None,
        auth_message=LOGIN,
        show_error=False,
        max_file_size=1,  # nothing here takes files
        ssr_mode=False,
        enable_monitoring=False,
        theme=_theme(),
        head=f"<style>{STYLE.read_text(encoding='utf-8')}</style><script>{RELEASE_BY_KEY}</script>",
    )
    _end_streams_on_stop(app, service)

    async def icon(_: Request) -> Response:
        return Response(ICON, media_type="image/svg+xml")

    async def manifest(_: Request) -> Response:
        return JSONResponse({"name": "Trimtab", "start_url": PATH})

    app.add_route("/favicon.ico", icon, include_in_schema=False)  # Starlette's routes for GET take HEAD, too
    app.add_route("/manifest.json", manifest, include_in_schema=False)


def _page(service: Service, book: VoteBook) -> gr.Blocks:
    blocks = gr.Blocks(analytics_enabled=False, title="Trimtab")
    with blocks:
        add_html(HEADER)
        notice = add_html(notice_html("Connecting …"))
        with gr.Tabs():
            with gr.Tab("Compare"):
                compare = Compare(service)
            with gr.Tab("Dial"):
                dial = Dial(service)
            with gr.Tab("Steer"):
                steer = Steer(service)
            with gr.Tab("Arena"):
                arena = Arena(service, book)

        async def load() -> AsyncIterator[Update]:
            """Offer what is loaded now; wait for it if need be."""
            while service.state == "loading":
                yield {notice: notice_html("The models are being loaded.")}
                await asyncio.sleep(LOOK_SECONDS)
            try:
                yield {notice: "", **compare.load(), **dial.load(), **steer.load(), **await arena.load()}
            except Refusal as refusal:
                yield {notice: notice_html(refusal.message, kind="problem")}

        shown = [notice, compare.aligner, compare.right, compare.kind, arena.one, arena.other, arena.kind, arena.hint]
        shown += [dial.one, dial.other, dial.dial, dial.left, dial.right, dial.kind]
        shown += [steer.learnt, steer.dials, *steer.choices, steer.kind]
        blocks.load(load, None, shown, show_progress="hidden", api_visibility="private")
    return blocks


def _check_key(keys: tuple[str, ...]) -> Callable[[str, str], bool]:
    """Whether a password is one of the keys, in time that depends neither on what agrees nor on which it is."""

    def check(_: str, password: str) -> bool:
        matches = [hmac.compare_digest(password.encode("utf-8", "replace"), key.encode()) for key in keys]
        return any(matches)

    return check


def _end_streams_on_stop(app: FastAPI, service: Service) -> None:
    """Let go of open pages when the server stops; each holds a connection that a shutdown would wait for."""
    inner = app.router.lifespan_context
    mounted: Any = next(route for route in app.routes if isinstance(route, Mount) and route.path == PATH).app

    async def wait() -> None:
        while service.state != "stopping":
            await asyncio.sleep(LOOK_SECONDS)
        mounted.stop_event.set()

    @contextlib.asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[object]:
        async with inner(served) as state:
            waiting = asyncio.ensure_future(wait())
            yield state
            waiting.cancel()

    app.router.lifespan_context = lifespan  # type: ignore[assignment]


def _theme() -> gr.themes.Base:
    """The report's colours and type; nothing is fetched."""
    steps = (
        "#eff5ff",
        "#dce9fd",
        "#bdd5fa",
        "#90b8f5",
        "#5a96ff",
        "#3b78e0",
        "#2563c8",
        "#1f52a6",
        "#1b4386",
        "#183768",
        "#10233f",
    )
    blue = colors.Color(*steps, name="trimtab")
    theme = gr.themes.Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    light = {"page": "#ffffff", "ink": "#1c2430", "soft": "#5c6878", "line": "#d9dfe7", "card": "#f6f8fa"}
    dark = {"page": "#12171e", "ink": "#e4e9f0", "soft": "#98a4b4", "line": "#323b48", "card": "#1b222c"}
    uses = {
        "body_background_fill": "page",
        "body_text_color": "ink",
        "body_text_color_subdued": "soft",
        "background_fill_primary": "page",
        "background_fill_secondary": "card",
        "border_color_primary": "line",
        "block_background_fill": "card",
        "block_border_color": "line",
        "block_label_text_color": "soft",
        "block_title_text_color": "soft",
        "block_info_text_color": "soft",
        "input_background_fill": "page",
        "input_border_color": "line",
        "input_placeholder_color": "soft",
        "button_secondary_background_fill": "card",
        "button_secondary_text_color": "ink",
    }
    chosen = {name: light[use] for name, use in uses.items()} | {f"{name}_dark": dark[use] for name, use in uses.items()}
    return theme.set(
        **chosen,
        button_primary_background_fill="#2563c8",
        button_primary_background_fill_hover="#1f52a6",
        button_primary_background_fill_dark="#2563c8",
        button_primary_background_fill_hover_dark="#3b78e0",
        button_primary_text_color="#ffffff",
        block_shadow="none",
    )
