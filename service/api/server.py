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
SECONDS_TO_END = 3
"""For requests that are being answered."""
LOOKS = 50
"""In a row, ten in a second, that have to show a failure: a process that was stopped for a while looks stuck at first."""
SECONDS_BETWEEN_THREADS = 0.001
"""After which a thread that computes, such as a plan for thousands of jobs, lets the one that answers go on; Python's is 0.005."""
SECONDS_TO_EXIT = 20.0
"""From then to the end of the process, whatever hangs in it."""


class Server(uvicorn.Server):
    """Server that runs until SIGINT, SIGTERM or a failure. A second signal ends it at once."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app = app
        self._failed_looks = 0
        sys.setswitchinterval(SECONDS_BETWEEN_THREADS)
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                http=HeaderDeadlineProtocol,
                ws="none",
                timeout_graceful_shutdown=SECONDS_TO_END,
                # uvicorn's default believes X-Forwarded-For of everybody on this machine.
                proxy_headers=settings.trusted_proxies is not None,
                forwarded_allow_ips=settings.trusted_proxies,
            )
        )

    @property
    def has_failed(self) -> bool:
        """Return whether the service has failed, so that a new process should replace it."""
        return self._failed_looks >= LOOKS

    async def on_tick(self, counter: int) -> bool:
        """Return whether uvicorn, which asks ten times a second, should exit."""
        health: Health | None = getattr(self._app.state, "health", None)
        self._failed_looks = self._failed_looks + 1 if health is not None and health.has_failed() else 0
        if self.has_failed:
            logger.critical("service failed; exiting with status 1 so that the process manager restarts it")
            # A thread that hangs, as in a storage that does not answer, would otherwise keep the process for ever.
            last_resort = threading.Timer(SECONDS_TO_EXIT, os._exit, [1])
            last_resort.daemon = True
            last_resort.start()
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the streams, whose readers resume elsewhere or later, and then shut down."""
        if (components := getattr(self._app.state, "components", None)) is not None:
            await components.watch.close()
        await super().shutdown(sockets)
