"""Aligners in service whose path is a link, as a loop's `current` is: when it leads elsewhere, what it leads to is loaded.

Requests that run go on with the aligner that they began with. What cannot be loaded is said once, and the old one stays.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from trimtab.errors import TrimtabError
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
    failed: dict[str, Path | None] = {}
    while True:
        await asyncio.sleep(SECONDS)
        if service.state != "ready":
            continue
        registry = service.registry
        for entry in await asyncio.to_thread(registry.moved):
            target = expand_home(entry.path).resolve()
            if failed.get(entry.name) == target:
                continue
            try:
                await service.load(registry.load, entry.name, entry.path, weight=entry.weight, pinned=entry.pinned)
                logger.info("aligner %s is now %s", entry.name, target)
            except (TrimtabError, OSError) as error:
                failed[entry.name] = target
                logger.warning("aligner %s stays as it was: %s cannot be loaded: %s", entry.name, target, error)
