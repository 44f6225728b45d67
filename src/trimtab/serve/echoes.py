"""Prompts that completions begin with, where a request asks for that."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams, TokenLogprobs
from trimtab.decode.scoring import score_in_steps
from trimtab.errors import DeadRow
from trimtab.serve import wire
from trimtab.serve.offsets import echo_ids, echo_text
from trimtab.serve.service import Service
from trimtab.serve.worker import Job

__all__ = ["Echo", "echo_prompts"]

ECHO_STEP = 512
"""Tokens of a prompt that are scored between two steps of the engine."""


@dataclass(frozen=True)
class Echo:
    """A prompt that its completions begin with."""

    text: str
    offsets: list[int]
    ids: list[int]
    scores: TokenLogprobs | None
    error: str | None = None
    """Why it has no scores."""

    def logprobs(self) -> tuple[list[float | None], list[wire.TopLogprobs | None]]:
        """Log-probability and best tokens of each id; nothing predicts the first, or any if there are no scores."""
        if self.scores is None:
            return [None] * len(self.ids), [None] * len(self.ids)
        tops: Sequence[wire.TopLogprobs] = self.scores.top_aligned or [[]] * len(self.scores.aligned)
        return [None, *self.scores.aligned], [None, *tops]


async def echo_prompts(
    service: Service, model: AlignedModel, params: SamplingParams, job: Job, prompts: Sequence[Prompt], *, last: bool
) -> list[Echo]:
    """The prompts as their completions begin with them, scored if log-probabilities are wanted.

    Args:
        service: the server.
        model: who scores.
        params: what was asked for.
        job: its sequences, with the prompts as ids.
        prompts: as they were given.
        last: whether nothing follows them.
    """
    ids = {s.prompt_index: s.prompt for s in job.sequences}
    echoes = []
    for prompt, mine in zip(prompts, ids.values(), strict=True):
        scores, dead = None, None
        if params.logprobs and len(mine) > 1:
            pair = (mine[:1], mine[1:])
            shaping = model.shaping(params)
            models, top = (model.proposal, model.aligners_of(shaping)), params.top_logprobs
            steps = score_in_steps(*models, shaping, [pair], top=top, step=ECHO_STEP)
            try:
                async with asyncio.timeout(service.remaining(job)):
                    (scores,) = await service.worker.score(steps)
            except DeadRow as error:
                dead = error
        if isinstance(prompt, str):
            text, offsets = prompt, echo_text(model.tokenizer, mine, prompt) if params.logprobs else []
        else:
            text, offsets = echo_ids(model.tokenizer, mine, last=last)
        echoes.append(Echo(text, offsets, mine, scores, None if dead is None else str(dead)))
    if dead is not None and all(echo.error for echo in echoes):
        raise dead
    return echoes
