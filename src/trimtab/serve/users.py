"""A server's users: pairs of answers come in, are compared by its aligners, and become weights for that user's requests."""

import asyncio
import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from trimtab.decode.aligned import AlignedModel
from trimtab.errors import DataError
from trimtab.models.fingerprint import fingerprint_of
from trimtab.serve.bank import Bank
from trimtab.serve.bodies import Preference
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.service import Refusal, Service, Target
from trimtab.users.run import described
from trimtab.users.settings import UserSettings
from trimtab.users.store import NoSuchUser, UserStore

__all__ = ["Users", "find_target"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Users:
    """Users of a server.

    Args:
        settings: what is kept.
        service: the server.
    """

    def __init__(self, settings: UserSettings, service: Service) -> None:
        self.settings, self._service = settings, service
        self._bank = Bank(service, settings.aligners, settings.beta, settings.prior_scale)
        self._opened: tuple[AlignedModel, UserStore] | None = None
        self._lock = threading.Lock()

    async def open(self) -> None:
        """Take the folder, once the models are loaded.

        Raises:
            InvalidOption: another process has it.
            OSError: it cannot be written.
        """
        await asyncio.to_thread(self._store, await self._bank.model())

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
        return [float(weight) for weight in self._bank.fit(features).mean]

    async def known(self, user: str) -> dict[str, Any]:
        """What `/v1/users/NAME` says.

        Raises:
            Refusal: nothing is known of them.
        """
        with _missing():
            return self._said(user, await self._do(lambda store: store.features(user)))

    async def prefer(self, user: str, asked: Preference) -> dict[str, Any]:
        """Learn that a user prefers one answer to another; what `known` says then.

        Raises:
            Refusal: the answers cannot be compared, or there is no room for another user.
        """
        nats = await self._bank.compare(asked.asked, asked.chosen, asked.rejected, unfinished=asked.unfinished or ())
        return self._said(user, await self._do(lambda store: store.add(user, nats)))

    async def forget(self, user: str) -> None:
        """Delete what is kept of a user.

        Raises:
            Refusal: nothing is.
        """
        with _missing():
            await self._do(lambda store: store.delete(user))

    def _said(self, user: str, features: Tensor) -> dict[str, Any]:
        return {
            "id": user,
            "object": "user",
            "pairs": len(features),
            **described(self.settings.aligners, self._bank.fit(features)),
        }

    async def _do(self, work: Callable[[UserStore], T]) -> T:
        """Work with what is kept, outside of the event loop."""
        model = await self._bank.model()
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
