"""A server's users: pairs of answers come in, are compared by its aligners, and become weights for that user's requests."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from trimtab.decode.aligned import AlignedModel
from trimtab.errors import DataError, InvalidRequest, TrimtabError
from trimtab.serve.bank import Bank
from trimtab.serve.bodies import Preference
from trimtab.serve.refusal import Refusal
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.service import Service, Target
from trimtab.users.run import described
from trimtab.users.settings import UserSettings
from trimtab.users.store import NoSuchUser, UserStore

__all__ = ["Users", "find_target"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOUR = 3600.0


class Users:
    """Users of a server.

    Args:
        settings: what is kept.
        service: the server.
    """

    def __init__(self, settings: UserSettings, service: Service) -> None:
        self.settings, self._service = settings, service
        self._bank = Bank(service, settings.aligners, settings.beta, settings.prior_scale)
        self._kept: UserStore | None = None
        self._sweeping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Take the folder; no model need be loaded.

        Raises:
            InvalidOption: another process has it.
            OSError: it cannot be written.
        """
        settings = self.settings
        limits: dict[str, Any] = {name: getattr(settings, name) for name in ("max_users", "max_pairs", "days")}
        self._kept = await asyncio.to_thread(UserStore, settings.folder, **limits)
        self._sweeping = asyncio.create_task(self._sweep())

    def close(self) -> None:
        """Let go of the folder."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._kept is not None:
            self._kept.close()

    async def weighted(self, user: str) -> tuple[AlignedModel, list[float]] | None:
        """The bank, and a user's weights of it; None if nothing is known of them.

        Raises:
            Refusal: the bank cannot be loaded now.
        """
        if not self._store.knows(user):
            return None
        model = await self._bank.model()
        try:
            features = await self._features(user, model)
        except NoSuchUser:
            return None
        return model, [float(weight) for weight in self._bank.fit(features).mean]

    async def known(self, user: str) -> dict[str, Any]:
        """What `/v1/users/NAME` says.

        Raises:
            Refusal: nothing is known of them.
        """
        with _missing():
            if not self._store.knows(user):
                raise NoSuchUser(f"nothing is known of a user '{user[:128]}'")
            return self._said(user, await self._features(user, await self._bank.model()))

    async def prefer(self, user: str, asked: Preference) -> dict[str, Any]:
        """Learn that a user prefers one answer to another; what `known` says then.

        Raises:
            Refusal: the answers cannot be compared, or there is no room for another user.
        """
        model = await self._bank.model()  # one for all: it may be replaced meanwhile
        answers = asked.asked, asked.chosen, asked.rejected
        nats = await self._bank.compare(model, *answers, unfinished=asked.unfinished or ())
        return self._said(user, await self._do(lambda: self._store.add(user, self._bank.digest(model), nats)))

    async def forget(self, user: str) -> None:
        """Delete what is kept of a user, whatever aligners there are now.

        Raises:
            Refusal: nothing is.
        """
        with _missing():
            await self._do(lambda: self._store.delete(user))

    @property
    def _store(self) -> UserStore:
        assert self._kept is not None  # requests come in when the server is ready
        return self._kept

    async def _features(self, user: str, model: AlignedModel) -> Tensor:
        return await self._do(lambda: self._store.features(user, self._bank.digest(model), len(self.settings.aligners)))

    def _said(self, user: str, features: Tensor) -> dict[str, Any]:
        fitted = described(self.settings.aligners, self._bank.fit(features))
        return {"id": user, "object": "user", "pairs": len(features), **fitted}

    async def _do(self, work: Callable[[], T]) -> T:
        """Work with what is kept, outside of the event loop."""
        with self._service.refusing("user"):
            try:
                return await asyncio.to_thread(work)
            except (NoSuchUser, InvalidRequest):
                raise
            except DataError as error:
                logger.exception("what is kept of a user cannot be read")
                raise Refusal(500, "what is kept of this user cannot be read; the server's log says why") from error
            except (OSError, TrimtabError) as error:
                logger.exception("users cannot be served")
                raise Refusal(503, "users cannot be served now; the server's log says why") from error

    async def _sweep(self) -> None:
        """Every hour."""
        while True:
            await asyncio.sleep(HOUR)
            try:
                await asyncio.to_thread(self._store.sweep)
            except OSError:
                logger.exception("what is too old cannot be taken from the disk")


async def find_target(
    service: Service, asked: ChatRequest | CompletionRequest, users: Users | None
) -> tuple[Target, dict[str, Any]]:
    """The model that a request means, and what its user's preferences say of how it decodes.

    Raises:
        Refusal: there is none; or the request says, too, what a user's weights say, or wants a rewriter where there is none.
    """
    if asked.rewrite:
        service.rewriting.check()
    plain = asked.aligner is None and service.plain_name(asked.model) == service.settings.name
    found = await users.weighted(asked.user) if users is not None and asked.user and plain else None
    if users is None or found is None:
        return await service.find(asked.model, asked.aligners), {}
    model, weights = found
    said = (name for name in ("rule", "weight", "blend", "rule_weight", "handover") if getattr(asked, name) is not None)
    if (name := next(said, None)) is not None:
        raise Refusal(400, f"{name}: the weights of this user decode the request: leave it out, or leave out user", param=name)
    return Target("+".join(users.settings.aligners), model), {"weight": weights}


@contextlib.contextmanager
def _missing() -> Iterator[None]:
    """Say that there is no such user as it is said of models."""
    try:
        yield
    except NoSuchUser as error:
        raise Refusal(404, str(error), param="user", code="user_not_found") from None
