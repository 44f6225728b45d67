"""A server's aligners together: by how much more each favours one answer than another, and the weights that pairs speak for."""

import hashlib
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from trimtab.core.user_weights import UserWeights, fit_user_weights
from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.scoring import score_in_steps
from trimtab.models.fingerprint import fingerprint_of
from trimtab.serve.refusal import Refusal
from trimtab.serve.service import Service
from trimtab.users.features import check_rule, compared
from trimtab.users.options import FitWeightsOptions

__all__ = ["Bank"]

NAMES = ("chosen", "rejected")

STEP = 512
"""Tokens of an answer that are scored between two steps of the engine."""


class Bank:
    """Some aligners of a server.

    Args:
        service: the server.
        aligners: their names.
        beta: as in `trimtab.users.options.FitWeightsOptions`.
        prior_scale: the same.
    """

    def __init__(
        self,
        service: Service,
        aligners: Sequence[str],
        beta: float = FitWeightsOptions.beta,
        prior_scale: float = FitWeightsOptions.prior_scale,
    ) -> None:
        self.service, self.aligners = service, tuple(aligners)
        self._how = beta, prior_scale
        self._digested: tuple[AlignedModel, str] | None = None

    async def model(self) -> AlignedModel:
        """The proposal with them, as they are now.

        Raises:
            Refusal: they cannot be loaded now, or do not go together.
        """
        model = (await self.service.find(self.service.settings.name, self.aligners)).model
        with self.service.refusing("aligner"):
            check_rule(model.shaping(model.defaults).rule)
        return model

    def digest(self, model: AlignedModel) -> str:
        """What tells a model's numbers from those of other aligners, rules or temperatures; it may read all weights.

        Raises:
            ModelError: the files have changed since they were loaded.
        """
        known = self._digested
        if known is None or known[0] is not model:
            shaping = model.shaping(model.defaults)
            parts = [*self.aligners, str(shaping.rule), repr(shaping.proposal), repr(shaping.aligners)]
            parts += map(fingerprint_of, (model.proposal, *model.aligners))
            known = self._digested = model, hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return known[1]

    async def compare(
        self, model: AlignedModel, prompt: Prompt, chosen: str, rejected: str, *, unfinished: Collection[str] = ()
    ) -> list[float]:
        """By how many nats more each favours `chosen`.

        Args:
            model: from `model`.
            prompt: what was answered.
            chosen: one answer.
            rejected: the other.
            unfinished: which of `"chosen"` and `"rejected"` were cut, and so have no end.

        Raises:
            Refusal: the answers are the same, or cannot be scored, or too much is waiting.
        """
        with self.service.refusing("prompt"):
            ended = [name not in unfinished for name in NAMES]
            found = model.encoder.answers(prompt, [chosen, rejected], "prompt", list(NAMES), ended)
            if found.answers[0] == found.answers[1]:
                raise Refusal(409, "chosen and rejected are the same, which says nothing", param="rejected")
            if (most := model.max_length) is not None and len(found.prompt) + max(map(len, found.answers)) > most:
                raise Refusal(400, f"prompt and answers must fit into {most} tokens: shorten them", param="chosen")
            shaping = model.shaping(model.defaults)
            pairs = [(found.prompt, answer) for answer in found.answers]
            steps = score_in_steps(model.proposal, model.aligners_of(shaping), shaping, pairs, step=STEP, inputs=True)
            nats = compared(shaping.rule, await self.service.score(steps))
        if not bool(nats.isfinite().all()):
            raise Refusal(400, "a model can never say one of the answers, so they cannot be compared", param="chosen")
        return [float(x) for x in nats[0]]

    def fit(self, features: Tensor) -> UserWeights:
        """The weights that pairs f `[N, K]` speak for; they start at 0, which is the proposal alone."""
        return fit_user_weights(features, torch.zeros(len(self.aligners), dtype=torch.float64), *self._how)
