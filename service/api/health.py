"""Readiness of the service and its dependencies, and reasons to exit."""

import asyncio
import logging
import time
from collections.abc import Awaitable

from service.adapters.run_storage import on_storage
from service.api.background import Background
from service.api.dependencies import Components
from service.api.schemas import Check, Readiness
from service.domain.errors import StorageFull

logger = logging.getLogger(__name__)
SECONDS_TO_CHECK = 5.0
SECONDS_KEPT = 1.0
"""An answer; anyone may ask, and however many do, what is asked is asked so often at most."""


class Health:
    """Health checks of the components and background tasks."""

    def __init__(self, components: Components, background: Background) -> None:
        self._components, self._background = components, background
        self._turn = asyncio.Lock()
        self._seen: tuple[float, Readiness] | None = None

    async def readiness(self) -> Readiness:
        """Return the state of all dependencies, at most a second old."""
        async with self._turn:
            if self._seen is None or time.monotonic() - self._seen[0] >= SECONDS_KEPT:
                self._seen = (time.monotonic(), await self._look())
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
            return Check(ok=False, detail="does not look after jobs; the service's log says more")
        return Check(ok=True, detail="looks after jobs")


async def _check(name: str, call: Awaitable[object]) -> Check:
    try:
        async with asyncio.timeout(SECONDS_TO_CHECK):
            await call
    except StorageFull as error:
        logger.warning("%s is not ready: %s", name, error)
        return Check(ok=False, detail="no space left on its disk")
    except Exception as error:  # whatever is wrong, it is the answer; addresses and the like are for the log alone
        logger.warning("%s is not ready: %s", name, error or type(error).__name__)
        return Check(ok=False, detail="does not answer; the service's log says more")
    return Check(ok=True, detail="answers")
