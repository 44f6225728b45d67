"""A server's aligners together: by how much more each favours one answer than another, and the weights that pairs speak for."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.user_weights import UserWeights, fit_user_weights
from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.scoring import score_in_steps
from trimtab.serve.service import Refusal, Service
from trimtab.users.features import check_rule, compared
from trimtab.users.options import FitWeightsOptions

__all__ = ["Bank"]

NAMES = ("chosen", "rejected")

STEP = 512
"""Tokens of an answer that are scored between two steps of the engine."""


@dataclass(frozen=True)
class Bank:
    """Some aligners of a server.

    Attributes:
        service: the server.
        aligners: their names.
        beta, prior_scale: as in `trimtab.users.options.FitWeightsOptions`.
    """

    service: Service
    aligners: Sequence[str]
    beta: float = FitWeightsOptions.beta
    prior_scale: float = FitWeightsOptions.prior_scale

    async def model(self) -> AlignedModel:
        """The proposal with them.

        Raises:
            Refusal: they cannot be loaded now, or do not go together.
        """
        model = (await self.service.find(self.service.settings.name, self.aligners)).model
        with self.service.refusing("aligner"):
            check_rule(model.shaping(model.defaults).rule)
        return model

    async def compare(self, prompt: Prompt, chosen: str, rejected: str, *, unfinished: Collection[str] = ()) -> list[float]:
        """By how many nats more each favours `chosen`.

        Args:
            prompt: what was answered.
            chosen: one answer.
            rejected: the other.
            unfinished: which of `"chosen"` and `"rejected"` were cut, and so have no end.

        Raises:
            Refusal: the answers are the same, or cannot be scored.
        """
        if chosen == rejected:
            raise Refusal(409, "chosen and rejected are the same, which says nothing", param="rejected")
        model = await self.model()
        with self.service.refusing("prompt"):
            found = model.encoder.answers(
                prompt, [chosen, rejected], "prompt", list(NAMES), [name not in unfinished for name in NAMES]
            )
            if (most := model.max_length) is not None and len(found.prompt) + max(map(len, found.answers)) > most:
                raise Refusal(400, f"prompt and answers must fit into {most} tokens: shorten them", param="chosen")
            shaping = model.shaping(model.defaults)
            pairs = [(found.prompt, answer) for answer in found.answers]
            steps = score_in_steps(model.proposal, model.aligners_of(shaping), shaping, pairs, step=STEP, inputs=True)
            async with asyncio.timeout(self.service.settings.request_timeout):
                nats = compared(shaping.rule, await self.service.worker.score(steps))
        if not bool(nats.isfinite().all()):
            raise Refusal(400, "a model can never say one of the answers, so they cannot be compared", param="chosen")
        return [float(x) for x in nats[0]]

    def fit(self, features: Tensor) -> UserWeights:
        """The weights that pairs f `[N, K]` speak for; they start at 0, which is the proposal alone."""
        prior = torch.zeros(len(self.aligners), dtype=torch.float64)
        return fit_user_weights(features, prior, self.beta, self.prior_scale)
