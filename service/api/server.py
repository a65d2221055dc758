"""uvicorn server that ends open streams at shutdown, and exits after a failure."""

import logging
import os
import socket
import sys
import threading

import uvicorn
from fastapi import FastAPI

from service.api.health import Health
from service.api.middleware import HeaderDeadlineProtocol
from service.settings import Settings

logger = logging.getLogger(__name__)
SHUTDOWN_TIMEOUT_SECONDS = 3
"""Time for requests in flight at shutdown."""
CHECKS_UNTIL_FAILURE = 50
"""Consecutive checks, ten per second, that must report a failure; a process that was suspended looks stuck at
first.
"""
EXIT_TIMEOUT_SECONDS = 20.0
"""Time between a failure and the forced exit of the process."""
THREAD_SWITCH_SECONDS = 0.001
"""Time that a computing thread, such as a plan for thousands of jobs, keeps the interpreter from the server.

With Python's default of 0.005 the p99 of answers meanwhile is 12 ms instead of 8 ms (docs/lab-book.md).
"""


class Server(uvicorn.Server):
    """Server that runs until SIGINT, SIGTERM or a failure.

    A second signal ends it at once.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app = app
        self._failed_checks = 0
        sys.setswitchinterval(THREAD_SWITCH_SECONDS)
        # Half a second of work, which no request should wait for. Not in a thread, where FastAPI's changes of
        # Python's warning filters would meet those of others.
        app.openapi()
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                http=HeaderDeadlineProtocol,
                ws="none",
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_SECONDS,
                # uvicorn's default believes X-Forwarded-For of everybody on this machine.
                proxy_headers=settings.trusted_proxies is not None,
                forwarded_allow_ips=settings.trusted_proxies,
            )
        )

    @property
    def has_failed(self) -> bool:
        """Return whether the service has failed, so that a new process should replace it."""
        return self._failed_checks >= CHECKS_UNTIL_FAILURE

    async def on_tick(self, counter: int) -> bool:
        """Return whether uvicorn, which asks ten times a second, should exit."""
        health: Health | None = getattr(self._app.state, "health", None)
        self._failed_checks = self._failed_checks + 1 if health is not None and health.has_failed() else 0
        if self.has_failed:
            logger.critical("service failed; exiting with status 1 so that the process manager restarts it")
            # A thread that hangs, as in a storage that does not answer, would otherwise keep the process for
            # ever.
            last_resort = threading.Timer(EXIT_TIMEOUT_SECONDS, os._exit, [1])
            last_resort.daemon = True
            last_resort.start()
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the streams, whose readers resume elsewhere or later, and then shut down."""
        if (components := getattr(self._app.state, "components", None)) is not None:
            await components.feed.close()
        await super().shutdown(sockets)
