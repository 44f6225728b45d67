"""Answers that grow side by side, for the playground: from a question to a job in the engine, and to what is shown of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from trimtab.data.prompts import Prompt
from trimtab.decode.request import Completion, SamplingParams, TokenEvent
from trimtab.serve.playground.tokens_html import Candidate, Shown
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service, Target
from trimtab.serve.worker import Job

__all__ = ["Answer", "Question", "watch"]

UPDATES_PER_SECOND = 12
TOKENS_PER_SECOND_OF_DRAWING = 4000
"""A browser draws the whole text at each update; long texts are updated less often, so that it keeps up."""
TOP = 5
ENDS = {"stop": "ended by itself", "length": "cut at the limit"}


@dataclass(frozen=True)
class Question:
    """What is asked of both sides.

    Attributes:
        text: of the prompt, or of the user's message.
        chat: whether it is a message.
        temperature, max_tokens: as in `SamplingParams`.
    """

    text: str
    chat: bool
    temperature: float
    max_tokens: int

    @property
    def prompt(self) -> Prompt:
        """For a tokenizer."""
        return [{"role": "user", "content": self.text}] if self.chat else self.text


class Answer:
    """One model's answer as it grows. Make one with `prepare`, and let `watch` run it.

    Attributes:
        label: the model's name.
        shaping: its rule, weights and the like.
        seed: the seed it is drawn with.
        events: one for each token so far.
        shown: the tokens as they are shown.
        completion: the whole, once it is complete.
        problem: why it could not be completed.
    """

    def __init__(self, service: Service, target: Target, params: SamplingParams, job: Job) -> None:
        self.label, self.seed = target.label, job.sequences[0].params.seed
        self.shaping = target.model.shaping(params)
        self.events: list[TokenEvent] = []
        self.shown: list[Shown] = []
        self.completion: Completion | None = None
        self.problem = ""
        self._service, self._job, self._tally = service, job, job.sequences[0].tally
        self._over = False
        self._special = set(getattr(target.model.tokenizer, "all_special_ids", ()))
        self._began = self._last = time.perf_counter()

    @classmethod
    async def prepare(
        cls,
        service: Service,
        question: Question,
        aligner: str | Sequence[str] | None,
        *,
        seed: int,
        logprobs: bool = False,
        **shaping: Any,
    ) -> Self:
        """An answer that has not begun.

        Args:
            service: the server.
            question: what is asked.
            aligner: its name, or several; None for the proposal alone.
            seed: as in `SamplingParams`.
            logprobs: whether tokens get their probabilities and candidates.
            shaping: fields of `SamplingParams` that replace the model's own: rule, weight and the like.

        Raises:
            Refusal: it cannot be answered.
        """
        if not question.text:
            raise Refusal(400, "Write a prompt first.")
        target = await service.find(service.settings.name, aligner)
        limit = service.limit(target, question.max_tokens, "max_tokens")
        with service.refusing(None):
            params = SamplingParams(
                max_tokens=limit,
                temperature=question.temperature,
                seed=seed,
                logprobs=logprobs,
                top_logprobs=TOP if logprobs else 0,
                **shaping,
            )
        job = await service.prepare(target, [question.prompt], params, "prompt", size=len(question.text))
        return cls(service, target, params, job)

    @property
    def note(self) -> str:
        """The model with its rule and strength, in words."""
        weights = ", ".join(f"{weight:.3g}" for weight in self.shaping.weights)
        return f"{self.label} · {self.shaping.rule} · strength {weights}" if weights else self.label

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    @property
    def cut(self) -> bool:
        """Whether the limit cut it."""
        return self.completion is not None and self.completion.finish_reason == "length"

    @property
    def text(self) -> str:
        """The text so far, without special tokens."""
        return self.completion.text if self.completion else "".join(event.text for event in self.events)

    @property
    def facts(self) -> list[str]:
        """How long it is, and how it ended."""
        count = len(self.events)
        length = [f"{count} token{'s' * (count > 1)}"] if count else []
        return length + [ENDS[self.completion.finish_reason] if self.completion else "stopped"] * self.over

    @property
    def measures(self) -> list[str]:
        """How fast it came, and how far the aligner took it from the proposal."""
        if not self.events:
            return []
        said = [f"{len(self.events) / max(self._last - self._began, 1e-9):.0f} tokens/s"]
        if (acceptance := self._tally.acceptance) is not None:
            said.append(f"{acceptance:.0%} of drafts accepted")
        ratios = [token.log_ratio for token in self.shown if token.log_ratio is not None]
        if ratios:
            said.append(f"mean log ratio {sum(ratios) / len(ratios):+.3f} nats per token")
        return said

    async def follow(self) -> None:
        """Run it to its end, or until the task is cancelled; what goes wrong is in `problem`."""
        outcome = "cancelled"
        try:
            async for events in self._service.events(self._job):
                self._last = time.perf_counter()
                for event in events:
                    if event.token is not None:
                        self.events.append(event)
                        self.shown.append(self._show(event, event.token))
            self.completion, outcome = self.events[-1].completion, "ok"
        except Refusal as refusal:
            self.problem, outcome = refusal.message, refusal.code or str(refusal.status)
        finally:
            self._over = True
            self._service.metrics.finish(self.label, self._job, time.perf_counter() - self._job.arrived, outcome)
            del self._job  # which holds its models; answers may be kept for long

    def _show(self, event: TokenEvent, token: int) -> Shown:
        texts, special = self._service.texts, token in self._special
        return Shown(
            "" if special else event.text,
            texts.text(token),
            special,
            event.proposal,
            event.aligned,
            [Candidate(texts.text(token), logp) for token, logp in event.top_proposal or ()],
            [Candidate(texts.text(token), logp) for token, logp in event.top_aligned or ()],
        )


async def watch(answers: Sequence[Answer], tasks: set["asyncio.Task[None]"]) -> AsyncGenerator[None, None]:
    """Run answers at the same time; yields now and then while there is news, and once when all are over.

    Args:
        answers: from `Answer.prepare`.
        tasks: gets their tasks, for whoever wants to stop them by cancelling.
    """
    mine = {asyncio.ensure_future(answer.follow()) for answer in answers}
    tasks |= mine
    known = 0
    try:
        pending = mine
        while pending:
            wait = max(1 / UPDATES_PER_SECOND, known / TOKENS_PER_SECOND_OF_DRAWING)
            _, pending = await asyncio.wait(pending, timeout=wait)
            count = sum(len(answer.events) for answer in answers)
            if count > known or not pending:
                known = count
                yield
    finally:
        tasks -= mine
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
