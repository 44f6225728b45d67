"""The playground's first tab: the same prompt and the same seed for the proposal alone and for the aligned model."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from trimtab.decode.request import SamplingParams
from trimtab.errors import TrimtabError
from trimtab.knobs import KNOBS
from trimtab.serve.playground.duel import Answer, Question
from trimtab.serve.playground.tab import OWN, QUIET, Tab, Update, add_html, answer_html, seed_of
from trimtab.serve.playground.tokens_html import legend_html, panel_html, text_html
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service

__all__ = ["Compare"]

OWN_STRENGTH = "The aligner’s own strength"


class Compare(Tab):
    """Proposal and aligned, side by side."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, "Compare")
        self.add_prompt()
        with gr.Row():
            self.aligner = gr.Dropdown([], label="Aligner", min_width=200)
            self.add_rule("the aligner’s own")
            with gr.Group(elem_classes="tt-strength"):
                self.strength = gr.Slider(0, 3, value=1, step=0.05, label="Strength of the aligner", buttons=[])
                self.own = gr.Checkbox(True, label=OWN_STRENGTH)
        with gr.Accordion("Sampling: temperature, length, seed", open=False), gr.Row():
            self.add_sampling()
            self.add_seed()
        self.add_buttons()
        with gr.Row(elem_classes="tt-answers", equal_height=True):
            waiting = text_html("", "The answer appears here.")
            with gr.Column(min_width=300):
                self.left = add_html(panel_html("Proposal", waiting), elem_id="tt-proposal")
            with gr.Column(min_width=300):
                self.right = add_html(panel_html("Aligned", waiting), elem_id="tt-aligned")
        add_html(legend_html())
        self.strength.input(None, None, self.own, js="() => false", **QUIET)
        gr.on(
            [self.aligner.change, self.rule.change, self.own.input],
            self._own_strength,
            [self.aligner, self.rule, self.own],
            [self.own, self.strength],
            **QUIET,
        )
        settings = [self.aligner, self.rule, self.own, self.strength, self.seed]
        asked = [self.prompt, self.kind, self.temperature, self.max_tokens]
        self.on_run(self._run, [*asked, *settings], [self.left, self.right, self.seed])

    def load(self) -> Update:
        """What the page shows once the models are there."""
        names = [entry.name for entry in self.service.registry.entries]
        chosen = names[0] if names else None
        empty = text_html("", "The answer appears here." if names else "No aligner is loaded: start with --aligner NAME=PATH.")
        return {
            self.aligner: gr.update(choices=names, value=chosen),
            self.right: panel_html("Aligned", empty),
            **self.show_chat(),
        }

    async def _run(
        self,
        text: str,
        kind: str,
        temperature: float,
        max_tokens: int,
        aligner: str | None,
        rule: str,
        own: bool,
        strength: float,
        seed: int | None,
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        question = Question(text, kind == "chat", temperature, max_tokens)
        seed = seed_of(seed)
        shaping: Any = {"rule": None if rule == OWN else rule, "weight": None if own else strength}

        async def prepare() -> list[Answer]:
            if aligner is None:
                return [await Answer.prepare(self.service, question, None, seed=seed)]
            aligned = await Answer.prepare(self.service, question, aligner, seed=seed, logprobs=True, **shaping)
            return [await Answer.prepare(self.service, question, aligner, seed=seed, **self._off(aligned)), aligned]

        def draw(answers: Sequence[Answer]) -> Update:
            drawn = {self.left: answer_html("Proposal", answers[0], self.service.settings.name, answers[0].facts)}
            if answers[1:]:
                drawn[self.right] = answer_html("Aligned", answers[1], answers[1].note, answers[1].facts + answers[1].measures)
            return {**drawn, self.seed: seed}

        async for update in self.play(prepare, draw, request.session_hash or ""):
            yield update

    def _off(self, aligned: Answer) -> dict[str, Any]:
        """The proposal, as the aligned model with its aligner off.

        That is the same distribution as the bare proposal, and it spends its random numbers as the aligned model does, whose
        aligner drafts. So texts from one seed differ only where the aligner makes them differ.
        """
        plain = self.service.registry.base.defaults
        neutral = {name: knob.said["neutral"] for name, knob in KNOBS.items() if knob.said["acts"] == "proposal"}
        own = {name: getattr(plain, name) for name in neutral}
        return {
            **{name: value if own[name] is None else own[name] for name, value in neutral.items()},
            "rule": "product"
            if aligned.shaping.rule.name == "product"
            else "geometric",  # drafts as the aligned one's rule does
            "weight": 0.0,
        }

    async def _own_strength(self, aligner: str | None, rule: str, own: bool) -> Update:
        """Show the aligner's own strength where it is wanted, if it can be told without loading anything."""
        try:
            model = None if aligner is None else self.service.registry.resident([aligner])
            if model is None:
                return {self.own: gr.update(label=OWN_STRENGTH)}
            weight = model.shaping(SamplingParams(rule=None if rule == OWN else rule)).weights[0]
        except (Refusal, TrimtabError):
            return {self.own: gr.update(label=OWN_STRENGTH)}
        shown: Update = {self.own: gr.update(label=f"{OWN_STRENGTH}: {weight:.3g}")}
        return {**shown, self.strength: min(max(weight, 0), 3)} if own else shown
