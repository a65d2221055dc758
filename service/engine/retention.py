"""Retention: what ended long ago is deleted, its files before its rows, so that what a crash leaves is found again."""

import asyncio
import logging
import shutil
from datetime import UTC, datetime, timedelta

from service.domain.errors import Unavailable
from service.engine.replica import Replica
from service.engine.run_files import RunFiles
from service.store.idempotency import IdempotencyStore
from service.store.retention import RetentionStore

logger = logging.getLogger(__name__)
PAUSE_SECONDS = 600.0
KEYS_LAST = timedelta(hours=25)
"""Clients may count on an Idempotency-Key for 24 hours."""
MOST_AT_ONCE = 50


class Retention:
    """Deletes for all replicas, where the scheduler's lease is held. `keep` is for how long; None: for ever."""

    def __init__(
        self,
        replica: Replica,
        store: RetentionStore,
        keys: IdempotencyStore,
        files: RunFiles,
        keep: timedelta | None,
    ) -> None:
        self._replica, self._store, self._keys, self._files, self._keep = replica, store, keys, files, keep

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                await self.round()
            except Exception as error:  # what could not be deleted is looked at again
                logger.warning("retention broken off: %s", error, exc_info=not isinstance(error, Unavailable | OSError))
            await asyncio.sleep(PAUSE_SECONDS)

    async def round(self) -> int:
        """Delete all that is old enough; return how many jobs that were."""
        if self._replica.scheduler() is None:
            return 0
        now, count = datetime.now(UTC), 0
        await self._keys.forget_before(now - KEYS_LAST)
        while self._keep is not None and (old := await self._store.jobs_ended_before(now - self._keep, MOST_AT_ONCE)):
            for job_id in old:
                await asyncio.to_thread(_delete, self._files, job_id)
            await self._store.forget_jobs(old)
            count += len(old)
            logger.info("%d jobs that ended before %s were deleted", len(old), now - self._keep)
        return count


def _delete(files: RunFiles, job_id: str) -> None:
    try:
        shutil.rmtree(files.job_folder(job_id))
    except FileNotFoundError:
        return
