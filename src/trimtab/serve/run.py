"""Start a server and keep it until it is told to stop."""

import asyncio
import logging
import logging.config
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from trimtab.origins import is_loopback
from trimtab.serve.logs import configure_logs
from trimtab.serve.service import Service

__all__ = ["run_server"]

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn's, which tells the service first that it is to stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no further requests, and let the running ones finish."""
        logger.info("stopping on %s", signal.Signals(sig).name)
        self._service.drain()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True  # and no more: uvicorn's own method would raise the signal again, after everything is done

    async def shutdown(self, sockets: Any = None) -> None:
        """Wait for the running requests; those that are not done in time are told so before their connections close."""
        deadline = asyncio.get_running_loop().call_later(self._service.settings.shutdown_timeout, self._service.abandon)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()


def run_server(app: FastAPI, service: Service, *, host: str, port: int, **tls: str | None) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; what was served.

    Args:
        app: from `make_app`, whose `on_failure` calls `app.state.stop`.
        service: the application's.
        host: where to listen.
        port: 0 for any that is free.
        tls: uvicorn's `ssl_keyfile` and `ssl_certfile`.

    Raises:
        TrimtabError: the models cannot be loaded.
        OSError: nothing can listen there.
    """
    logging.config.dictConfig(configure_logs())
    if not is_loopback(host) and not service.settings.api_keys:
        logger.warning("listening on %s without an API key: anybody who reaches it may use it; set --api_key", host)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(service.settings.shutdown_timeout) + 5,
        **tls,  # type: ignore[arg-type]
    )
    server = _Server(config, service)

    def stop() -> None:
        server.should_exit = True

    app.state.stop = stop
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=config.backlog)
    logger.info("listening on %s://%s:%d", "https" if tls.get("ssl_keyfile") else "http", host, listening.getsockname()[1])
    server.run(sockets=[listening])
    if service.failure is not None:
        raise service.failure
    return service.report()
