"""uvicorn, told to end open streams before it waits for open connections."""

import socket

import uvicorn
from fastapi import FastAPI

from service.settings import Settings

SECONDS_TO_END = 3
"""For requests that are being answered."""


class Server(uvicorn.Server):
    """Serves the application until SIGINT or SIGTERM; a second one ends it at once."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                timeout_graceful_shutdown=SECONDS_TO_END,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, whose readers go on elsewhere or later, and then all else."""
        if (components := getattr(self._app.state, "components", None)) is not None:
            await components.watch.close()
        await super().shutdown(sockets)
