"""The playground's dial between two aligners: their weights blended on one side, their rows mixed on the other.

Both sides have the same prompt, seed and weights, 1 − x for one aligner and x for the other; only the first says
`blend="weights"`. Letting go of the dial asks again, and cancels what still runs.
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

import gradio as gr

from trimtab.serve.playground.duel import Answer, Question
from trimtab.serve.playground.tab import OWN, Tab, Update, add_html, answer_html, seed_of
from trimtab.serve.playground.tokens_html import legend_html, notice_html, panel_html, text_html
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service

__all__ = ["RELEASE_BY_KEY", "Asked", "Dial"]

BLENDED, MIXED = "Weights blended", "Logits mixed"
TWO_NEEDED = "The dial needs two aligners: start with --aligner NAME=PATH --aligner NAME=PATH."
STEP, DIGITS = 0.05, 2
START = 0.5
RELEASE_BY_KEY = """
document.addEventListener("keyup", ({target, key}) => {
  if (target.closest?.("#tt-dial") && (target.type === "range" || key === "Enter"))
    target.dispatchEvent(new PointerEvent("pointerup", {bubbles: true}));
});
"""
"""A script: letting go of a key is letting go of the dial; Gradio tells of pointers alone."""


class Asked(NamedTuple):
    """What the controls say.

    Attributes:
        text: of the prompt.
        kind: `"text"` or `"chat"`.
        temperature, max_tokens, seed: as in `SamplingParams`; without a seed, a fresh one is drawn.
        one: the aligner at 0.
        other: the aligner at 1.
        rule: a rule, or `OWN`.
        dial: x, from 0 to 1; None where its number was deleted.
    """

    text: str
    kind: str
    temperature: float
    max_tokens: int
    one: str | None
    other: str | None
    rule: str
    seed: int | None
    dial: float | None

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each aligner, as `aligner` says them over HTTP.

        The first aligner drafts. So the one that counts is the first at both ends, and there both sides draw the same text.

        Raises:
            Refusal: there are no two aligners, or no number.
        """
        if self.one is None or self.other is None:
            raise Refusal(400, TWO_NEEDED)
        if self.one == self.other:
            raise Refusal(400, "Choose two different aligners.")
        if self.dial is None:
            raise Refusal(400, "Set the dial to a number from 0 to 1.")
        weights = {self.one: round(1 - self.dial, DIGITS), self.other: self.dial}
        return dict(reversed(weights.items())) if self.dial == 1 else weights


class Dial(Tab):
    """Two aligners with weights that sum to 1, blended and mixed, side by side."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, "Run")
        self._newest: dict[str, object] = {}
        """What tells the newest run from those before it, by session."""
        self.add_prompt()
        with gr.Row():
            self.one = gr.Dropdown([], label="Aligner at 0", min_width=200)
            self.other = gr.Dropdown([], label="Aligner at 1", min_width=200)
            self.add_rule("the aligners’ own")
        self.dial = gr.Slider(
            0,
            1,
            value=START,
            step=STEP,
            precision=DIGITS,
            label="Dial",
            info="The weight of the aligner at 1; the other has the rest. Both sides ask again when you let go.",
            buttons=[],
            elem_id="tt-dial",
        )
        self.place = gr.State(START)
        with gr.Accordion("Sampling: temperature, length, seed", open=False), gr.Row():
            self.add_sampling()
            self.add_seed()
        self.add_buttons()
        with gr.Row(elem_classes="tt-answers", equal_height=True):
            with gr.Column(min_width=300):
                self.left = add_html(elem_id="tt-blended")
            with gr.Column(min_width=300):
                self.right = add_html(elem_id="tt-mixed")
        add_html(legend_html())
        self.on_choice([self.one, self.other], _name_ends, self.dial)
        how = [self.prompt, self.kind, self.temperature, self.max_tokens, self.one, self.other, self.rule, self.seed, self.dial]
        outputs = [self.left, self.right, self.seed]
        self.on_run(self.run, how, outputs)
        released = [self.dial.release]
        self.on_run(self.turn, [self.place, *how], [*outputs, self.place], triggers=released, trigger_mode="multiple")

    def load(self) -> Update:
        """What the page shows once the models are there."""
        names = [entry.name for entry in self.service.registry.entries]
        one, other = names[:2] if len(names) > 1 else (next(iter(names), None), None)
        empty = text_html("", "The answer appears here." if other else TWO_NEEDED)
        return {
            self.one: gr.update(choices=names, value=one),
            self.other: gr.update(choices=names, value=other),
            self.dial: _name_ends(one, other),
            self.left: panel_html(BLENDED, empty),
            self.right: panel_html(MIXED, empty),
            **self.show_chat(),
        }

    async def turn(self, request: gr.Request, place: float, *asked: Any) -> AsyncGenerator[Update, None]:
        """The dial was let go of: ask again if it was moved, and there is something to ask.

        Args:
            request: tells the session.
            place: where the dial was let go of before.
            asked: the fields of `Asked`.
        """
        now = Asked(*asked)
        yield {self.place: now.dial}
        if now.text and now.dial != place:
            async with contextlib.aclosing(self.run(request, *asked)) as updates:
                async for update in updates:
                    yield update

    async def run(self, request: gr.Request, *asked: Any) -> AsyncGenerator[Update, None]:
        """Ask both, instead of what still runs for this session.

        Args:
            request: tells the session.
            asked: the fields of `Asked`.
        """
        session, mine = request.session_hash or "", object()
        self._newest[session] = mine
        self.cancel(session)
        try:
            async with contextlib.aclosing(self._ask(Asked(*asked), session)) as updates:
                async for update in updates:
                    if self._newest.get(session) is not mine:
                        return
                    yield update
        finally:
            if self._newest.get(session) is mine:
                del self._newest[session]

    async def _ask(self, asked: Asked, session: str) -> AsyncGenerator[Update, None]:
        question = Question(asked.text, asked.kind == "chat", asked.temperature, asked.max_tokens)
        seed, refused = seed_of(asked.seed), ""
        yield {self.seed: seed}

        async def ask(**how: Any) -> Answer:
            rule = None if asked.rule == OWN else asked.rule
            weights = asked.weights
            how |= {"rule": rule, "weight": list(weights.values()), "seed": seed, "logprobs": True}
            return await Answer.prepare(self.service, question, list(weights), **how)

        async def prepare() -> list[Answer]:
            """Both; or the mixed one alone, where the weights cannot be blended."""
            nonlocal refused
            mixed = await ask()
            try:
                return [mixed, await ask(blend="weights", rule_weight=1.0)]
            except Refusal as refusal:
                refused = refusal.message
                return [mixed]

        def draw(answers: Sequence[Answer]) -> Update:
            sides = [_draw(title, answer, asked) for title, answer in zip((MIXED, BLENDED), answers, strict=False)]
            return {self.right: sides[0], self.left: sides[1] if sides[1:] else panel_html(BLENDED, notice_html(refused))}

        async with contextlib.aclosing(self.play(prepare, draw, session)) as updates:
            async for update in updates:
                yield update


def _draw(title: str, answer: Answer, asked: Asked) -> str:
    """One side, with the weights in the order of the controls."""
    weights = asked.weights
    shares = " + ".join(f"{weights[name]:g} {name}" for name in (asked.one, asked.other) if name is not None)
    return answer_html(title, answer, f"{shares} · {answer.shaping.rule}", answer.facts + answer.measures)


def _name_ends(one: str | None, other: str | None) -> Update:
    """Say at the dial which aligner is at which end."""
    return gr.update(label=f"Dial: 0 is all {one}, 1 is all {other}" if one and other else "Dial")
