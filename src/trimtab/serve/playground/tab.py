"""What the tabs of the playground have in common: a prompt, how to draw, buttons to run and to stop, a place for messages."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import gradio as gr

from trimtab.core.noise import fresh_seed
from trimtab.core.rules import RULES
from trimtab.serve.playground.duel import Answer, watch
from trimtab.serve.playground.tokens_html import notice_html, panel_html, text_html, tokens_html
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service

__all__ = ["Tab", "Update", "add_html", "answer_html", "seed_of"]

logger = logging.getLogger(__name__)

Update = dict[Any, Any]
"""New values, or properties, by component."""
OWN = "="
"""Stands for the aligners' own rule; no rule is called so."""
MOST_TOKENS = 512
"""What the playground's sliders go up to."""
MOST_SEEDS = 2**31
"""Seeds that fit a number field."""
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}


def add_html(value: str = "", **settings: Any) -> gr.HTML:
    """HTML in our own style, without Gradio's."""
    return gr.HTML(value, apply_default_css=False, **settings)


def answer_html(title: str, answer: Answer, note: str, facts: Sequence[str]) -> str:
    """One side; cards come once it is complete, for until then every update would take the focus away."""
    if not answer.shown and answer.over:
        body = text_html("", "Nothing came.")
    else:
        body = tokens_html(answer.shown, f"tt-{title}", cards=answer.over)
    return panel_html(title, body, note=note, facts=facts, busy=not answer.over)


def seed_of(seed: int | None) -> int:
    """What the seed's field says, or a fresh one where it is empty."""
    return fresh_seed() % MOST_SEEDS if seed is None else seed


class Tab:
    """Controls and their handlers; they are made inside of `gr.Blocks`.

    Args:
        service: the server.
        run_label: what the button says.
    """

    def __init__(self, service: Service, run_label: str) -> None:
        self.service = service
        self._run_label = run_label
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        """What runs, by session."""

    def add_prompt(self) -> None:
        """The prompt, and a switch for chats, which `show_chat` shows."""
        self.prompt = gr.Textbox(
            label="Prompt",
            lines=3,
            max_lines=12,
            placeholder="What shall the models read? Shift+Enter runs it.",
            elem_classes="tt-prompt",
        )
        self.kind = gr.Radio(
            [("Text to continue", "text"), ("Message to answer", "chat")],
            value="text",
            label="The prompt is a",
            visible=False,
        )

    def add_sampling(self) -> None:
        """How to draw."""
        most = min(self.service.settings.max_tokens or MOST_TOKENS, MOST_TOKENS)
        self.temperature = gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature", buttons=[])
        self.max_tokens = gr.Slider(1, most, value=min(128, most), step=1, precision=0, label="Most tokens", buttons=[])

    def add_rule(self, own: str) -> None:
        """The rule; `own` says whose is taken if none is chosen."""
        rules = [(name.replace("_", " "), name) for name, rule in RULES.items() if rule.has_row]
        self.rule = gr.Dropdown([(own, OWN), *rules], value=OWN, label="Rule", min_width=200)

    def add_seed(self) -> None:
        """The seed, and a button for a new one."""
        with gr.Row(elem_classes="tt-seed"):
            self.seed = gr.Number(0, precision=0, minimum=0, label="Seed, the same on both sides", min_width=160, scale=3)
            dice = gr.Button("🎲 New seed", min_width=110, scale=1)
        dice.click(lambda: seed_of(None), None, self.seed, **QUIET)

    def add_buttons(self) -> None:
        """Run and stop, and messages below."""
        with gr.Row(elem_classes="tt-buttons"):
            self.go = gr.Button(self._run_label, variant="primary", scale=3, min_width=140)
            self.halt = gr.Button("Stop", scale=1, min_width=90, interactive=False)
        self.notice = add_html()
        self.halt.click(self._stop, queue=False, api_visibility="private")

    def on_run(
        self,
        run: Callable[..., AsyncIterator[Update]],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        triggers: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        """Call `run` when asked to; every update may also change the buttons and the message.

        Args:
            run: the handler.
            inputs: components whose values it takes.
            outputs: components that it changes.
            triggers: what asks for it; default: the button, and the prompt.
            settings: further ones of `gr.on`.
        """
        gr.on(
            list(triggers or (self.go.click, self.prompt.submit)),
            run,
            list(inputs),
            [*outputs, self.go, self.halt, self.notice],
            concurrency_limit=None,
            **QUIET,
            **settings,
        )

    def on_choice(self, choices: Sequence[gr.Dropdown], show: Callable[..., Any], shown: Any) -> None:
        """Call `show` when the user has chosen; not at `change`, which `load` would set off with half of what it says.

        Args:
            choices: whose values `show` takes.
            show: the handler.
            shown: what it changes.
        """
        gr.on([choice.input for choice in choices], show, list(choices), shown, trigger_mode="always_last", **QUIET)

    def show_chat(self) -> Update:
        """The switch, if there is a chat template: then a prompt is a message, unless the user says otherwise."""
        template = getattr(self.service.registry.base.tokenizer, "chat_template", None)
        return {self.kind: gr.update(visible=True, value="chat") if template else gr.update(visible=False, value="text")}

    async def play(
        self, prepare: Callable[[], Awaitable[Sequence[Answer]]], draw: Callable[[Sequence[Answer]], Update], session: str
    ) -> AsyncGenerator[Update, None]:
        """Prepare some answers and show them as they grow; what goes wrong becomes a message."""
        yield {self.go: gr.update(interactive=False), self.halt: gr.update(interactive=True), self.notice: ""}
        problem = ""
        try:
            answers = await prepare()
            yield draw(answers)
            tasks = self._tasks.setdefault(session, set())
            async with contextlib.aclosing(watch(answers, tasks)) as news:
                async for _ in news:
                    yield draw(answers)
            problem = next((answer.problem for answer in answers if answer.problem), "")
        except Refusal as refusal:
            problem = refusal.message
        except Exception:
            logger.exception("the playground failed")
            problem = "Something went wrong. The server's log says what."
        finally:
            if not self._tasks.get(session):
                self._tasks.pop(session, None)
        yield {
            self.go: gr.update(interactive=True),
            self.halt: gr.update(interactive=False),
            self.notice: notice_html(problem, kind="problem"),
        }

    def cancel(self, session: str) -> None:
        """Let nothing go on that runs for a session."""
        for task in self._tasks.get(session, ()):
            task.cancel()

    async def _stop(self, request: gr.Request) -> None:
        self.cancel(request.session_hash or "")
