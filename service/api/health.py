"""Readiness of the service and its dependencies, and reasons to exit."""

import asyncio
import logging
import time
from collections.abc import Awaitable

from service.adapters.run_storage import on_storage
from service.api.dependencies import Components
from service.api.schemas import Check, Readiness
from service.domain.errors import StorageFull
from service.engine.background import Background

logger = logging.getLogger(__name__)
CHECK_TIMEOUT_SECONDS = 5.0
CACHE_SECONDS = 1.0
"""Time for which a readiness response is reused, however many clients ask."""


class Health:
    """Health checks of the components and background tasks."""

    def __init__(self, components: Components, background: Background) -> None:
        self._components, self._background = components, background
        self._turn = asyncio.Lock()
        self._seen: tuple[float, Readiness] | None = None

    async def readiness(self) -> Readiness:
        """Return the state of all dependencies, from a check that ended within a second."""
        async with self._turn:
            if self._seen is None or time.monotonic() - self._seen[0] >= CACHE_SECONDS:
                readiness = await self._look()
                self._seen = (time.monotonic(), readiness)
            return self._seen[1]

    def has_failed(self) -> bool:
        """Return whether this process has failed and does not recover without a restart."""
        return bool(self._background.ended()) or self._components.dispatcher.is_stuck()

    async def _look(self) -> Readiness:
        parts = self._components
        database, ray, mlflow, storage = await asyncio.gather(
            _check("database", parts.database.check()),
            _check("ray", parts.ray.cluster()),
            _check("mlflow", parts.mlflow.check()),
            _check("storage", on_storage(parts.files.check)),
        )
        dispatcher = self._check_tasks()
        is_ready = all(check.ok for check in (database, ray, mlflow, storage, dispatcher))
        return Readiness(
            ready=is_ready, database=database, ray=ray, mlflow=mlflow, storage=storage, dispatcher=dispatcher
        )

    def _check_tasks(self) -> Check:
        """Check that this replica reconciles jobs: its tasks run and its leases hold."""
        if self.has_failed() or not self._components.replica.is_alive:
            ended = ", ".join(self._background.ended()) or "none"
            logger.warning("the dispatcher is not ready: ended: %s", ended)
            return Check(ok=False, detail="does not reconcile jobs; see the log of the service")
        return Check(ok=True, detail="reconciles jobs")


async def _check(name: str, call: Awaitable[object]) -> Check:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            await call
    except StorageFull as error:
        logger.warning("%s is not ready: %s", name, error)
        return Check(ok=False, detail="no space left on its disk")
    except Exception as error:  # of any kind; addresses and other details are for the log only
        logger.warning("%s is not ready: %s", name, error or type(error).__name__)
        return Check(ok=False, detail="does not answer; see the log of the service")
    return Check(ok=True, detail="answers")
