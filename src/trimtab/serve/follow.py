"""Aligners in service whose path is a link, as a loop's `current` is: when it leads elsewhere, what it leads to is loaded.

Requests that run go on with the aligner that they began with. What cannot be loaded is said once, and the old one stays.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from trimtab.files import expand_home
from trimtab.serve.service import Service

__all__ = ["SECONDS", "following"]

logger = logging.getLogger(__name__)

SECONDS = 2.0
"""Between two looks."""


@contextlib.asynccontextmanager
async def following(service: Service) -> AsyncIterator[None]:
    """Look at the links of a service that is open, as long as the block runs."""
    task = asyncio.create_task(_follow(service))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _follow(service: Service) -> None:
    failed: dict[str, Path] = {}
    while True:
        await asyncio.sleep(SECONDS)
        if service.state != "ready":
            continue
        try:
            await _look(service, failed)
        except Exception:  # whatever a file system, or a library that loads weights, gives rise to
            logger.exception("links to aligners cannot be followed now")


async def _look(service: Service, failed: dict[str, Path]) -> None:
    """Load what links lead to now; what has failed is tried again once its link has led elsewhere."""
    registry = service.registry
    moved = {entry.name: entry for entry in await asyncio.to_thread(registry.moved)}
    for name in failed.keys() - moved.keys():
        del failed[name]
    for name, entry in moved.items():
        target = expand_home(entry.path).resolve()
        if failed.get(name) == target:
            continue
        failed[name] = target
        try:
            await service.load(registry.load, name, entry.path, weight=entry.weight, pinned=entry.pinned)
        except Exception as error:
            logger.warning("aligner %s stays as it was: %s cannot be loaded: %s", name, target, error)
        else:
            del failed[name]
            logger.info("aligner %s is now %s", name, target)
