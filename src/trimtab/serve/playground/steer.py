"""The playground's tab that learns what its user likes: two answers, "this one, rather", and dials that move.

Each round draws two answers from one seed. One has the weights that are likeliest so far, the other has weights drawn from what
they might be; which is which, nobody is told. So as long as little is known the two differ, and a choice says much; later they
come together. A choice moves the weights and asks again at once. What is learnt is kept in the page, as numbers.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from trimtab.core.noise import fresh_seed
from trimtab.core.user_weights import UserWeights
from trimtab.decode.aligned import AlignedModel
from trimtab.serve.bank import Bank
from trimtab.serve.playground.duel import Answer, Question
from trimtab.serve.playground.tab import QUIET, Tab, Update, add_html, seed_of
from trimtab.serve.playground.tokens_html import dials_html, notice_html, panel_html, text_html
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service
from trimtab.serve.values import MAX_ALIGNERS
from trimtab.users.run import described

__all__ = ["Learnt", "Steer"]

NAMES = ("Answer A", "Answer B")
NONE = "Steering needs an aligner: start with --aligner NAME=PATH."


@dataclass
class Learnt:
    """What a page has learnt of its user.

    Attributes:
        aligners: the bank.
        nats: of each choice, by how much more each aligner favours what was chosen.
        question: the last one, once it was answered.
        answers: its two answers.
        model: the bank as it was loaded when the first choice was made; None before.
        over: whether the page has started over, and knows nothing of this any more.
    """

    aligners: tuple[str, ...] = ()
    nats: list[list[float]] = field(default_factory=list)
    question: Question | None = None
    answers: Sequence[Answer] = ()
    model: AlignedModel | None = None
    over: bool = False

    @property
    def features(self) -> Tensor:
        """F `[N, K]`."""
        return torch.tensor(self.nats, dtype=torch.float64).reshape(len(self.nats), len(self.aligners))

    @property
    def can_choose(self) -> bool:
        """Whether there are two answers of which one can be better."""
        whole = [answer for answer in self.answers if answer.completion is not None]
        return len(whole) == len(NAMES) and whole[0].text != whole[1].text


class Steer(Tab):
    """All aligners at once, with weights that choices move."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, "Ask")
        self.add_prompt()
        with gr.Accordion("Sampling: temperature, length", open=False), gr.Row():
            self.add_sampling()
        self.add_buttons()
        self.dials = add_html(elem_id="tt-dials")
        with gr.Row(elem_classes="tt-answers", equal_height=True):
            waiting = text_html("", "Two answers appear here. Choose one, and the next ones are more like it.")
            self.panels, self.choices = [], []
            for i, name in enumerate(NAMES):
                with gr.Column(min_width=300):
                    self.panels.append(add_html(panel_html(name, waiting), elem_id=f"tt-steer-{i}"))
                    self.choices.append(gr.Button(f"This one, rather ({name[-1]})", interactive=False, scale=0))
        with gr.Row(elem_classes="tt-buttons"):
            self.again = gr.Button("Start over", min_width=140, scale=0)
        self.learnt = gr.State(None)
        asked = [self.learnt, self.prompt, self.kind, self.temperature, self.max_tokens]
        outputs = [*self.panels, *self.choices, self.dials, self.learnt]
        self.on_run(self.run, asked, outputs)
        for i, choice in enumerate(self.choices):
            self.on_run(self._chooser(i), asked, outputs, triggers=[choice.click])
        self.again.click(self.start_over, self.learnt, outputs, **QUIET)

    def load(self) -> Update:
        """What the page shows once the models are there."""
        return {**self.forget(), **self.show_chat()}

    def start_over(self, request: gr.Request, learnt: Learnt | None) -> Update:
        """Stop what runs, and forget all choices.

        Args:
            request: tells the session.
            learnt: what is forgotten.
        """
        self.cancel(request.session_hash or "")
        if learnt is not None:
            learnt.over = True
        return self.forget()

    def forget(self) -> Update:
        """As if nothing had been chosen."""
        learnt = Learnt(tuple(entry.name for entry in self.service.registry.entries)[:MAX_ALIGNERS])
        return {self.learnt: learnt, self.dials: self._show(learnt), **self._choosing(None)}

    async def run(
        self, request: gr.Request, learnt: Learnt, text: str, kind: str, temperature: float, max_tokens: int
    ) -> AsyncGenerator[Update, None]:
        """Draw two answers.

        Args:
            request: tells the session.
            learnt: what is known so far.
            text: of the prompt.
            kind: `"text"` or `"chat"`.
            temperature: as in `SamplingParams`.
            max_tokens: the same.
        """
        question, seed = Question(text, kind == "chat", temperature, max_tokens), seed_of(None)
        learnt.question, learnt.answers = None, ()

        async def prepare() -> Sequence[Answer]:
            if not learnt.aligners:
                raise Refusal(400, NONE)
            bank = Bank(self.service, learnt.aligners)
            if (model := await bank.model()) is not learnt.model:  # another one's numbers mean nothing
                learnt.model, learnt.nats = model, []
            fitted = bank.fit(learnt.features)
            sides = [fitted.mean, drawn(fitted)][:: -1 if fresh_seed() & 1 else 1]
            names = list(learnt.aligners)
            learnt.answers = [
                await Answer.prepare(self.service, question, names, seed=seed, weight=weights.tolist()) for weights in sides
            ]
            learnt.question = question
            return learnt.answers

        def draw(answers: Sequence[Answer]) -> Update:
            panels = [_draw(name, answer) for name, answer in zip(NAMES, answers, strict=True)]
            return dict(zip(self.panels, panels, strict=True))

        yield {**self._choosing(None), self.dials: self._show(learnt)}
        async for update in self.play(prepare, draw, request.session_hash or ""):
            yield {
                part: value for part, value in update.items() if not learnt.over or part in (self.go, self.halt, self.notice)
            }
        if not learnt.over:
            yield {**self._choosing(learnt), self.dials: self._show(learnt), self.learnt: learnt}

    def _chooser(self, chosen: int) -> Callable[..., AsyncGenerator[Update, None]]:
        async def choose(request: gr.Request, learnt: Learnt, *asked: Any) -> AsyncGenerator[Update, None]:
            async for update in self._choose(chosen, request, learnt, *asked):
                yield update

        return choose

    async def _choose(self, chosen: int, request: gr.Request, learnt: Learnt, *asked: Any) -> AsyncGenerator[Update, None]:
        """Learn from a choice, and ask again."""
        question, answers = learnt.question, learnt.answers
        if question is None or not learnt.can_choose:
            return
        learnt.question = None  # before anything else can come in
        yield self._choosing(None)
        try:
            this, other = answers[chosen], answers[1 - chosen]
            cut = [name for name, one in (("chosen", this), ("rejected", other)) if one.cut]
            bank = Bank(self.service, learnt.aligners)
            assert learnt.model is not None  # as of the answers
            nats = await bank.compare(learnt.model, question.prompt, this.text, other.text, unfinished=cut)
            if learnt.over:
                return
            learnt.nats.append(nats)
        except Refusal as refusal:
            yield {self.notice: notice_html(refusal.message, kind="problem")}
            return
        async for update in self.run(request, learnt, *asked):
            yield update

    def _choosing(self, learnt: Learnt | None) -> Update:
        """The buttons, for answers of which one may be chosen."""
        can = learnt is not None and learnt.can_choose
        return {choice: gr.update(interactive=can) for choice in self.choices}

    def _show(self, learnt: Learnt) -> str:
        """The dials."""
        if not learnt.aligners:
            return notice_html(NONE)
        said = described(learnt.aligners, Bank(self.service, learnt.aligners).fit(learnt.features))
        return dials_html([(name, said["weights"][name], *said["interval"][name]) for name in learnt.aligners])


def drawn(fitted: UserWeights) -> Tensor:
    """Weights that a user might have, from the normal law of what is known."""
    generator = torch.Generator().manual_seed(fresh_seed())
    noise = torch.randn(len(fitted.mean), generator=generator, dtype=torch.float64)
    root: Tensor = torch.linalg.cholesky(fitted.covariance)
    return fitted.mean + root @ noise


def _draw(title: str, answer: Answer) -> str:
    placeholder = "An empty answer." if answer.over else "…"
    return panel_html(
        title, text_html(answer.text, placeholder), facts=answer.facts if answer.over else (), busy=not answer.over
    )
