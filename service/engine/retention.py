"""Retention: deletion of old jobs.

Rows are deleted first, with a note of the folders left, so that a crash leaves nothing behind.
"""

import logging
import shutil
from datetime import UTC, datetime, timedelta

from service.adapters.run_storage import RunFiles, on_storage
from service.domain.errors import UpstreamUnavailable
from service.engine.background import periodic
from service.engine.lease_holder import LeaseHolder
from service.store.credentials import CredentialStore
from service.store.idempotency import IdempotencyStore
from service.store.retention import RetentionStore
from service.store.webhooks import WebhookStore

logger = logging.getLogger(__name__)
PAUSE_SECONDS = 600.0
KEYS_LAST = timedelta(hours=25)
"""Time for which idempotency keys are kept; clients may rely on 24 hours."""
MESSAGES_LAST = timedelta(days=30)
"""Time for which ended messages are kept."""
MAX_JOBS_PER_PASS = 50
"""Maximum number of jobs that are deleted in one transaction."""
MAX_MESSAGES_PER_PASS = 1_000


class Retention:
    """Retention, run by the holder of the scheduler lease.

    `keep` is None for unlimited.
    """

    def __init__(
        self,
        replica: LeaseHolder,
        store: RetentionStore,
        webhooks: WebhookStore,
        keys: IdempotencyStore,
        credentials: CredentialStore,
        files: RunFiles,
        keep: timedelta | None,
    ) -> None:
        self._replica, self._store, self._webhooks, self._keys = replica, store, webhooks, keys
        self._credentials, self._files, self._keep = credentials, files, keep

    async def run(self) -> None:
        """Run until cancelled."""
        await periodic("retention", self.delete_old, PAUSE_SECONDS)

    async def delete_old(self) -> int:
        """Delete everything that is old enough; return the number of jobs."""
        if self._replica.scheduler() is None:
            return 0
        now, count = datetime.now(UTC), 0
        await self._keys.delete_before(now - KEYS_LAST)
        await self._credentials.delete_expired()
        while await self._webhooks.delete_ended(now - MESSAGES_LAST, MAX_MESSAGES_PER_PASS):
            pass
        while self._keep is not None and (
            deleted := await self._store.delete_jobs(now - self._keep, MAX_JOBS_PER_PASS)
        ):
            count += deleted
            logger.info("%d jobs that ended before %s were deleted", deleted, now - self._keep)
        await self._delete_folders()
        return count

    async def _delete_folders(self) -> None:
        if not (left := await self._store.folders_left()):
            return
        await on_storage(
            self._files.check
        )  # a storage that is away has no folders, and they would be taken for deleted
        for job_id in left:
            try:
                await on_storage(_delete, self._files, job_id)
            except (
                UpstreamUnavailable
            ) as error:  # it keeps no other waiting, and is tried again in the next round
                logger.warning(
                    "the folder of %s could not be deleted: %s", job_id, error, extra={"job_id": job_id}
                )
            else:
                await self._store.delete_folder(job_id)


def _delete(files: RunFiles, job_id: str) -> None:
    folder = files.job_folder(job_id)
    if folder.is_symlink():  # put there by user code; what it leads to is not the job's
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
