"""Admission of queued jobs, by the holder of the scheduler lease."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from service.adapters.ray import RayJobs
from service.domain.errors import UpstreamUnavailable
from service.domain.leases import Lease
from service.domain.scheduling import Policy, SchedulableJob, plan
from service.engine.submitter import ACTOR, Submitter
from service.store.jobs import JobStore

FORGET_SECONDS = 60.0
"""Period after which all reasons are read again; they may differ after a commit whose response was lost."""


class Admission:
    """Admission of queued jobs."""

    def __init__(
        self, jobs: JobStore, ray: RayJobs, attempts: Submitter, policy: Callable[[], Policy]
    ) -> None:
        self._jobs, self._ray, self._attempts, self._policy = jobs, ray, attempts, policy
        self._lease: Lease | None = None
        """Lease token of the following facts; another replica may have changed them since."""
        self._learnt_at = 0.0
        self._known: dict[str, SchedulableJob] = {}
        self._reasons: dict[str, str] = {}
        """Reasons for waiting by job id."""

    async def admit(self, lease: Lease) -> None:
        """Start the jobs that the plan admits, and store why the others wait.

        Raises UpstreamUnavailable.
        """
        now = time.monotonic()
        if lease != self._lease or now - self._learnt_at > FORGET_SECONDS:
            self._lease, self._learnt_at, self._known, self._reasons = lease, now, {}, {}
        queue = await self._jobs.queue(self._known)
        self._known = queue.waiting
        reasons = self._reasons | queue.reasons
        self._reasons = {candidate.id: reasons[candidate.id] for candidate in queue.waiting.values()}
        if not queue.waiting:
            return
        try:
            cluster = await self._ray.cluster()
        except UpstreamUnavailable as error:
            await self._explain(dict.fromkeys(self._reasons, f"waits for Ray: {error}"), lease)
            raise
        active = [replace(job, has_workers=job.submission_id in cluster.placed) for job in queue.active]
        # In a thread: with thousands in the queue it takes long enough to keep requests waiting.
        chosen = await asyncio.to_thread(
            plan, queue.waiting.values(), active, cluster, self._policy(), datetime.now(UTC)
        )
        await self._explain(chosen.reasons, lease)
        for job_id, preemptor in chosen.preempted.items():
            await self._jobs.preempt(job_id, preemptor, ACTOR, lease)
        results = await asyncio.gather(
            *[self._start(candidate.id, lease) for candidate in chosen.admitted], return_exceptions=True
        )
        for candidate, result in zip(chosen.admitted, results, strict=True):
            if isinstance(result, UpstreamUnavailable):
                await self._explain({candidate.id: f"waits: {result}"}, lease)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _start(self, job_id: str, lease: Lease) -> None:
        await self._attempts.start(await self._jobs.get(job_id), lease)

    async def _explain(self, reasons: dict[str, str], lease: Lease) -> None:
        """Store changed reasons of queued jobs."""
        changed = {job_id: reason for job_id, reason in reasons.items() if self._reasons[job_id] != reason}
        if changed:
            await self._jobs.set_queue_reasons(changed, lease)
            self._reasons |= changed
