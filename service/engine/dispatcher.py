"""Reconcile loop over unfinished jobs, and admission of queued ones.

A tick starts a task for each unfinished job of this replica's leases. A task that hangs, such as a call to an
upstream that does not answer, continues during the next ticks and delays no other job.
"""

import asyncio
import logging
import math
import time
from contextlib import suppress
from functools import partial

from prometheus_client import Histogram

from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import Job, JobState
from service.engine.admission import Admission
from service.engine.background import periodic
from service.engine.lease_holder import LeaseHolder
from service.engine.reconciler import Reconciler
from service.engine.run_finisher import RunFinisher
from service.engine.task_pool import TaskPool
from service.logging import current_job_id
from service.store.jobs import JobStore

logger = logging.getLogger(__name__)
MAX_CONCURRENT_JOBS = 32
STUCK_SECONDS = 180.0
"""Time without a finished tick or task, or in which all ticks failed by internal errors."""
ADMISSION, COMPARISONS = "admission", "comparisons"
"""Names of the tasks that do not belong to one job."""
WAIT_SECONDS = 0.5
"""Time that a tick waits for its tasks."""
MAX_PAUSE_SECONDS = 5.0
"""Maximum pause between two ticks while an upstream does not answer."""
MIN_REST_SECONDS = 0.1
MAX_WAKE_DELAY_SECONDS = 1.0
"""Maximum delay of a tick that a submission requests, unless the current tick takes longer."""
REST_PER_TICK = 19
"""Pause relative to the duration of a tick; `MAX_WAKE_DELAY_SECONDS` limits it."""


class Dispatcher:
    """Dispatcher of jobs, from the queue to their end."""

    def __init__(
        self,
        lease_holder: LeaseHolder,
        jobs: JobStore,
        reconciler: Reconciler,
        admission: Admission,
        finisher: RunFinisher,
        tick_seconds: Histogram,
        poll_seconds: float,
    ) -> None:
        self._lease_holder, self._jobs, self._reconciler = lease_holder, jobs, reconciler
        self._admission, self._finisher = admission, finisher
        self._tick_seconds, self._poll_seconds = tick_seconds, poll_seconds
        self._tasks = TaskPool(MAX_CONCURRENT_JOBS)
        self._woken = asyncio.Event()
        self._pause_seconds = poll_seconds
        self._started_at = self._ended_at = time.monotonic()
        self._failing_since = math.inf

    def wake(self) -> None:
        """Start the next tick as soon as possible."""
        self._woken.set()

    def is_stuck(self) -> bool:
        """Return whether work hangs, or all ticks have failed, beyond all time limits."""
        since = min(self._ended_at, self._tasks.working_since(), self._failing_since)
        return time.monotonic() - since > STUCK_SECONDS

    async def run(self) -> None:
        """Run ticks until cancelled. A failed tick is logged, and the next one retries."""
        try:
            await periodic("tick of the dispatcher", self._timed_tick, self._pause)
        finally:
            await self._tasks.close()

    async def tick(self, seconds: float = WAIT_SECONDS) -> None:
        """Reconcile all jobs of the leases that this replica holds, within a time limit.

        Raises UpstreamUnavailable if the database or Ray is unavailable; an error of one job is logged.
        """
        await self._reconciler.refresh()
        for job in await self._jobs.open_jobs(self._lease_holder.shards()):
            # A queued job needs one statement, and does not wait for jobs that wait for upstreams.
            is_limited = job.state != JobState.QUEUED
            self._tasks.start(job.id, partial(self._reconcile, job), limited=is_limited)
        await self._wait(seconds)
        # After the jobs, so that resources of ended ones are free.
        if (lease := self._lease_holder.scheduler()) is not None:
            self._tasks.start(ADMISSION, partial(self._admission.admit, lease), limited=False)
            # Apart from admission: reports take calls to MLflow, which must not delay jobs.
            self._tasks.start(COMPARISONS, self._finisher.finish_comparisons, limited=False)
            await self._wait(seconds)

    async def _reconcile(self, job: Job) -> None:
        if (lease := self._lease_holder.of_job(job.id)) is not None:
            current_job_id.set(job.id)
            # A change may have freed resources, or needs a further step.
            if await self._reconciler.reconcile(job, lease):
                self.wake()

    async def _wait(self, seconds: float) -> None:
        """Wait for the tasks and log their errors.

        An error of one job does not delay the others.
        """
        errors = await self._tasks.wait(seconds)
        of_jobs = {name: e for name, e in errors.items() if name != ADMISSION and isinstance(e, Exception)}
        for name, error in of_jobs.items():
            known = isinstance(error, UpstreamUnavailable)
            extra = {} if name == COMPARISONS else {"job_id": name}
            logger.warning("%s: %s", name, error, exc_info=None if known else error, extra=extra)
        for name, other in errors.items():
            if name not in of_jobs:
                raise other

    async def _timed_tick(self) -> None:
        self._woken.clear()
        self._started_at = time.monotonic()
        with self._tick_seconds.time():
            await self.tick()

    async def _pause(self, error: Exception | None) -> None:
        """Sleep until the next tick.

        This is the poll interval, shorter when woken, and longer after errors.
        """
        self._ended_at = time.monotonic()
        # Readiness reports an upstream that does not answer, which a restart would not repair.
        is_ours = error is not None and not isinstance(error, UpstreamUnavailable)
        self._failing_since = min(self._failing_since, self._started_at) if is_ours else math.inf
        longer = min(2 * self._pause_seconds, MAX_PAUSE_SECONDS)
        self._pause_seconds = self._poll_seconds if error is None else max(self._poll_seconds, longer)
        took = self._ended_at - self._started_at
        # Rest even when woken: a stream of submissions would otherwise run ticks without a pause.
        rest = max(min(REST_PER_TICK * took, MAX_WAKE_DELAY_SECONDS - took), MIN_REST_SECONDS)
        await asyncio.sleep(rest)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), self._pause_seconds - rest)
