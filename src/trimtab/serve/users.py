"""A server's users: pairs of answers come in, are compared by its aligners, and become weights for that user's requests."""

import asyncio
import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.core.user_weights import fit_user_weights
from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.scoring import score_in_steps
from trimtab.errors import DataError
from trimtab.models.fingerprint import fingerprint_of
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.service import Refusal, Service, Target
from trimtab.users.features import compared
from trimtab.users.run import described
from trimtab.users.settings import UserSettings
from trimtab.users.store import NoSuchUser, UserStore

__all__ = ["Users", "find_target"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

STEP = 512
"""Tokens of an answer that are scored between two steps of the engine."""


class Users:
    """Users of a server.

    Args:
        settings: what is kept.
        service: the server.
    """

    def __init__(self, settings: UserSettings, service: Service) -> None:
        self.settings, self._service = settings, service
        self._opened: tuple[AlignedModel, UserStore] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the folder."""
        with self._lock:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = None

    async def weights(self, user: str) -> list[float] | None:
        """A user's weights of the bank, in its order; None if nothing is known of them.

        Raises:
            Refusal: the bank cannot be loaded now.
        """
        try:
            features = await self._do(lambda store: store.features(user))
        except NoSuchUser:
            return None
        return fit_user_weights(features, *self._how).mean.tolist()

    async def known(self, user: str) -> dict[str, Any]:
        """What `/v1/users/NAME` says.

        Raises:
            Refusal: nothing is known of them.
        """
        with _missing():
            return self._said(user, await self._do(lambda store: store.features(user)))

    async def prefer(self, user: str, prompt: Prompt, chosen: str, rejected: str) -> dict[str, Any]:
        """Learn that a user prefers one answer to another; what `known` says then.

        Raises:
            Refusal: the answers cannot be compared, or there is no room for another user.
        """
        [nats] = (await self.compare(prompt, chosen, rejected)).tolist()
        return self._said(user, await self._do(lambda store: store.add(user, nats)))

    async def forget(self, user: str) -> None:
        """Delete what is kept of a user.

        Raises:
            Refusal: nothing is.
        """
        with _missing():
            await self._do(lambda store: store.delete(user))

    async def compare(self, prompt: Prompt, chosen: str, rejected: str) -> Tensor:
        """F `[1, K]` of two answers.

        Raises:
            Refusal: they are the same, or cannot be scored.
        """
        if chosen == rejected:
            raise Refusal(409, "chosen and rejected are the same, which says nothing", param="rejected")
        model = await self._bank()
        with self._service.refusing("prompt"):
            found = model.encoder.answers(prompt, [chosen, rejected], "prompt", ["chosen", "rejected"], [True, True])
            if (most := model.max_length) is not None and len(found.prompt) + max(map(len, found.answers)) > most:
                raise Refusal(400, f"prompt and answers must fit into {most} tokens: shorten them", param="chosen")
            shaping = model.shaping(model.defaults)
            pairs = [(found.prompt, answer) for answer in found.answers]
            steps = score_in_steps(model.proposal, model.aligners_of(shaping), shaping, pairs, step=STEP, inputs=True)
            async with asyncio.timeout(self._service.settings.request_timeout):
                nats = compared(shaping.rule, await self._service.worker.score(steps))
        if not bool(nats.isfinite().all()):
            raise Refusal(400, "a model can never say one of the answers, so they cannot be compared", param="chosen")
        return nats

    def fit(self, features: Tensor) -> dict[str, Any]:
        """Weights and intervals by name, of pairs f `[N, K]`."""
        return described(self.settings.aligners, fit_user_weights(features, *self._how))

    @property
    def _how(self) -> tuple[Tensor, float, float]:
        """Where weights start, and by how much pairs may move them."""
        prior = torch.zeros(len(self.settings.aligners), dtype=torch.float64)
        return prior, self.settings.beta, self.settings.prior_scale

    def _said(self, user: str, features: Tensor) -> dict[str, Any]:
        return {"id": user, "object": "user", "pairs": len(features), **self.fit(features)}

    async def _bank(self) -> AlignedModel:
        return (await self._service.find(self._service.settings.name, self.settings.aligners)).model

    async def _do(self, work: Callable[[UserStore], T]) -> T:
        """Work with what is kept, outside of the event loop."""
        model = await self._bank()
        with self._service.refusing("user"):
            try:
                return await asyncio.to_thread(lambda: work(self._store(model)))
            except NoSuchUser:
                raise
            except DataError as error:
                logger.exception("what is kept of a user cannot be read")
                raise Refusal(500, "what is kept of this user cannot be read; the server's log says why") from error
            except OSError as error:
                logger.exception("what is kept of a user cannot be written")
                raise Refusal(503, f"what is kept of this user cannot be written: {error.strerror}") from error

    def _store(self, model: AlignedModel) -> UserStore:
        """What is kept of the bank as it is loaded now."""
        with self._lock:
            if self._opened is None or self._opened[0] is not model:
                if self._opened is not None:
                    self._opened[1].close()
                    self._opened = None
                settings, rule = self.settings, model.shaping(model.defaults).rule
                parts = [*settings.aligners, str(rule), *map(fingerprint_of, model.models.all)]
                bank = hashlib.sha256("\n".join(parts).encode()).hexdigest()
                limits: dict[str, Any] = {name: getattr(settings, name) for name in ("max_users", "max_pairs", "days")}
                self._opened = model, UserStore(settings.folder, bank, len(settings.aligners), **limits)
            return self._opened[1]


async def find_target(
    service: Service, asked: ChatRequest | CompletionRequest, users: Users | None
) -> tuple[Target, dict[str, Any]]:
    """The model that a request means, and what its user's preferences say of how it decodes.

    Raises:
        Refusal: there is none; or the request says, too, what a user's weights say.
    """
    plain = asked.aligner is None and service.plain_name(asked.model) == service.settings.name
    weights = await users.weights(asked.user) if users is not None and asked.user and plain else None
    if users is None or weights is None:
        return await service.find(asked.model, asked.aligners), {}
    said = (name for name in ("rule", "weight", "blend", "rule_weight", "handover") if getattr(asked, name) is not None)
    if (name := next(said, None)) is not None:
        raise Refusal(400, f"{name}: the weights of this user decode the request: leave it out, or leave out user", param=name)
    target = await service.find(asked.model, users.settings.aligners)
    return target, {"weight": weights}


@contextlib.contextmanager
def _missing() -> Iterator[None]:
    """Say that there is no such user as it is said of models."""
    try:
        yield
    except NoSuchUser as error:
        raise Refusal(404, str(error), param="user", code="user_not_found") from None
