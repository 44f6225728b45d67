"""The playground's second tab: two answers without names, and a vote for the better one.

Votes are the data of `trimtab train --objective preference`. A round is kept on the server until it is voted on, so that a vote
is about what was shown, and counts once.
"""

import asyncio
import datetime
import shlex
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from trimtab.core.noise import fresh_seed
from trimtab.errors import TrimtabError
from trimtab.serve.playground.duel import Answer, Question
from trimtab.serve.playground.tab import QUIET, Tab, Update, add_html
from trimtab.serve.playground.tokens_html import command_html, notice_html, panel_html, text_html
from trimtab.serve.playground.votes import Verdict, VoteBook
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service

__all__ = ["Arena"]

PROPOSAL = "="
"""Stands for the proposal alone; no aligner is called so."""
NAMES = ("Answer A", "Answer B")
VERDICTS: dict[Verdict, str] = {"left": "A is better", "right": "B is better", "tie": "Tie", "both_bad": "Both are bad"}


@dataclass
class Round:
    """Two answers to one question, as they were shown.

    Attributes:
        question: what was asked.
        answers: A and B.
        voted: whether there has been a vote.
    """

    question: Question
    answers: Sequence[Answer]
    voted: bool = False

    @property
    def complete(self) -> bool:
        """Whether both answers came to their ends."""
        return all(answer.completion is not None for answer in self.answers)

    @property
    def same(self) -> bool:
        """Whether there is nothing to prefer."""
        return self.answers[0].text == self.answers[1].text


class Arena(Tab):
    """A blind comparison of two models.

    Args:
        service: the server.
        book: where votes go.
    """

    def __init__(self, service: Service, book: VoteBook) -> None:
        super().__init__(service, "Ask both")
        self._book = book
        self.add_prompt()
        with gr.Row():
            self.one = gr.Dropdown([("proposal alone", PROPOSAL)], value=PROPOSAL, label="One model", min_width=200)
            self.other = gr.Dropdown([], label="The other model", min_width=200)
        with gr.Accordion("Sampling: temperature, length", open=False), gr.Row():
            self.add_sampling()
        self.add_buttons()
        with gr.Row(elem_classes="tt-answers", equal_height=True):
            waiting = text_html("", "Which model answers here is drawn anew for each round.")
            self.panels = []
            for i, name in enumerate(NAMES):
                with gr.Column(min_width=300):
                    self.panels.append(add_html(panel_html(name, waiting), elem_id=f"tt-answer-{i}"))
        with gr.Row(elem_classes="tt-votes"):
            self.votes = {verdict: gr.Button(text, interactive=False, min_width=130) for verdict, text in VERDICTS.items()}
        self.outcome = add_html()
        self.hint = add_html(elem_id="tt-hint")
        self.round = gr.State(None)
        for verdict, button in self.votes.items():
            outputs = [*self.panels, *self.votes.values(), self.outcome, self.hint]
            button.click(self._voter(verdict), [self.round, self.one, self.other], outputs, **QUIET)
        self.on_choice([self.one, self.other], self._hint, self.hint)
        asked = [self.prompt, self.kind, self.temperature, self.max_tokens, self.one, self.other]
        self.on_run(self._run, asked, [*self.panels, *self.votes.values(), self.outcome, self.round])

    async def load(self) -> Update:
        """What the page shows once the models are there."""
        names = [entry.name for entry in self.service.registry.entries]
        choices = [("proposal alone", PROPOSAL), *((name, name) for name in names)]
        other = next(iter(names), None)
        return {
            self.one: gr.update(choices=choices, value=PROPOSAL),
            self.other: gr.update(choices=choices, value=other),
            self.hint: await self._hint(PROPOSAL, other),
            **self.show_chat(),
        }

    async def _run(
        self,
        text: str,
        kind: str,
        temperature: float,
        max_tokens: int,
        one: str,
        other: str | None,
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        question = Question(text, kind == "chat", temperature, max_tokens)
        current: list[Round] = []

        async def prepare() -> Sequence[Answer]:
            if other is None or one == other:
                raise Refusal(400, "Choose two different models.")
            names = (other, one) if fresh_seed() & 1 else (one, other)
            answers = [
                await Answer.prepare(self.service, question, None if name == PROPOSAL else name, seed=fresh_seed())
                for name in names
            ]
            current.append(Round(question, answers))
            return answers

        def draw(answers: Sequence[Answer]) -> Update:
            panels = [_draw(name, answer, text) for name, answer, text in zip(NAMES, answers, _level(answers), strict=True)]
            return dict(zip(self.panels, panels, strict=True))

        yield {**self._voting(None), self.outcome: "", self.round: None}
        async for update in self.play(prepare, draw, request.session_hash or ""):
            yield update
        if current and current[0].complete:
            said = "The answers are the same." if current[0].same else ""
            yield {**self._voting(current[0]), self.round: current[0], self.outcome: notice_html(said)}

    def _voter(self, verdict: Verdict) -> Callable[..., Coroutine[Any, Any, Update]]:
        async def vote(current: Round | None, one: str, other: str | None) -> Update:
            return await self._vote(verdict, current, one, other)

        return vote

    async def _vote(self, verdict: Verdict, current: Round | None, one: str, other: str | None) -> Update:
        """Write a vote, and tell which model was which."""
        if current is None or current.voted or not current.complete:
            return self._voting(None)
        current.voted = True  # before anything else can come in
        left, right = current.answers
        facts = {
            "models": [left.label, right.label],
            "seeds": [left.seed, right.seed],
            "finish_reasons": [answer.completion.finish_reason for answer in current.answers if answer.completion],
            "temperature": current.question.temperature,
            "max_tokens": current.question.max_tokens,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        prompt: Any = current.question.prompt
        try:
            await asyncio.to_thread(self._book.append, prompt, left.text, right.text, verdict, **facts)
        except (OSError, TrimtabError) as error:
            current.voted = False
            return {self.outcome: notice_html(f"The vote could not be written: {error}", kind="problem")}
        panels = [
            _draw(f"{name}: {answer.label}", answer, answer.text) for name, answer in zip(NAMES, current.answers, strict=True)
        ]
        said = notice_html(f"Written: “{VERDICTS[verdict]}”. A was {left.note}; B was {right.note}.")
        hint = await self._hint(one, other)
        return {**self._voting(None), **dict(zip(self.panels, panels, strict=True)), self.outcome: said, self.hint: hint}

    def _voting(self, current: Round | None) -> Update:
        """The vote's buttons, for a round that may be voted on."""
        return {
            button: gr.update(interactive=current is not None and not (current.same and verdict in ("left", "right")))
            for verdict, button in self.votes.items()
        }

    async def _hint(self, one: str, other: str | None) -> str:
        """How many votes there are, and what to do with them."""
        preferences, others = await asyncio.to_thread(lambda: (_lines(self._book.path), _lines(self._book.ties)))
        said = (
            f"Votes in {self._book.path}: {preferences} for one side, {others} for neither. The first are training data: "
            "these two commands make a better aligner of them, and serve it beside the old one."
        )
        try:
            base = str(getattr(self.service.registry.base.tokenizer, "name_or_path", "") or self.service.settings.name)
            paths = {entry.name: entry.path for entry in self.service.registry.entries}
        except Refusal as refusal:
            return notice_html(refusal.message)
        name = next((name for name in (other, one) if name in paths), "ALIGNER")
        path = paths.get(name, name)
        train = ["trimtab", "train", "--objective", "preference", "--proposal", base, "--aligner", path]
        train += ["--dataset", str(self._book.path), "--output_dir", "better"]
        serve = [
            "trimtab",
            "serve",
            "--proposal",
            base,
            "--aligner",
            f"{name}={path}",
            "--aligner",
            "better=better",
            "--playground",
        ]
        return command_html(said, [shlex.join(train), shlex.join(serve)])


def _level(answers: Sequence[Answer]) -> list[str]:
    """The texts as far as both have come, so that speed does not tell who is who; all of it once one is complete."""
    if any(answer.over for answer in answers):
        return [answer.text for answer in answers]
    count = min(len(answer.events) for answer in answers)
    return ["".join(event.text for event in answer.events[:count]) for answer in answers]


def _draw(title: str, answer: Answer, text: str) -> str:
    placeholder = "An empty answer." if answer.over else "…"
    return panel_html(title, text_html(text, placeholder), facts=answer.facts if answer.over else (), busy=not answer.over)


def _lines(path: Path) -> int:
    """How many lines a file has, if there is one."""
    try:
        with path.open("rb") as stream:
            return sum(1 for _ in stream)
    except FileNotFoundError:
        return 0
