"""Reconciliation of one job: observe, decide, act.

Each step is stored under the guard of the job's version and of this replica's lease, so that nothing is
decided on an old state. No network call is made inside a transaction. A kill between any two steps is
repaired by the next tick: a job is marked as submitted before it is sent to Ray, under a constant submission
id.
"""

import logging
import time
from datetime import UTC, datetime

from service.adapters.run_storage import on_storage
from service.domain.jobs import ACTIVE_STATES, Job, JobState, Transition
from service.domain.leases import Lease
from service.domain.lifecycle import (
    Advance,
    Command,
    Limits,
    Observation,
    RayStatus,
    Submission,
    after_stop,
    decide,
)
from service.engine.metric_alerts import MetricAlerts
from service.engine.run_finisher import RunFinisher
from service.engine.submitter import ACTOR, Submitter, Upstreams
from service.store.jobs import JobStore
from trainer.jobspec import Outcome, Progress

logger = logging.getLogger(__name__)


class Reconciler:
    """Reconciler of stored and observed state, one job at a time."""

    def __init__(
        self,
        jobs: JobStore,
        upstreams: Upstreams,
        submitter: Submitter,
        finisher: RunFinisher,
        alerts: MetricAlerts,
        limits: Limits,
    ) -> None:
        self._jobs, self._ray, self._files = jobs, upstreams.ray, upstreams.files
        self._submitter, self._finisher, self._alerts, self._limits = submitter, finisher, alerts, limits
        self._last_changes: dict[str, tuple[object, float]] = {}
        """Ray's status and the driver's heartbeat, and the time of their last change, by submission."""

    async def refresh(self) -> None:
        """Load what all jobs have in common; once per tick."""
        await self._alerts.refresh()

    async def reconcile(self, job: Job, lease: Lease) -> bool:
        """Take the next step of a job; return whether another one may follow at once."""
        observation = None
        if job.state in ACTIVE_STATES:
            # Before the files are read: a driver writes its outcome, and then ends.
            submission = await self._ray.find(job.submission_id)
            outcome, progress, heartbeat = await on_storage(self._read_files, job)
            await self._alerts.poll(job)
            if progress is not None and progress != job.progress:
                updated = await self._jobs.update_fields(job, lease, progress=progress)
                if updated is None:
                    return False
                job = updated
            age = self._heartbeat_age(job, submission, heartbeat)
            observation = Observation(submission, outcome, age)
        match decide(job, observation, self._limits, datetime.now(UTC)):
            case Advance(transition, stop):
                return await self._advance(job, transition, observation, lease, stop=stop)
            case Command.FINISH_RUN:
                await self._finisher.finish_job(job, lease)
            case Command.SUBMIT:
                await self._submitter.submit(job, lease)
            case Command.STOP:
                await self._ray.stop(job.submission_id)
            case Command.CLOSE:
                await on_storage(self._files.close_attempts, job)
            case Command.SAVE:
                await on_storage(self._files.request_stop, job)
            case Command.WITHDRAW:
                await self._withdraw(job, lease)
            case Command.WAIT:
                pass
        return False

    async def _advance(
        self, job: Job, transition: Transition, observation: Observation | None, lease: Lease, *, stop: bool
    ) -> bool:
        if not await self._jobs.advance(job, transition, ACTOR, lease):
            return False
        logger.info(
            "%s: %s -> %s: %s",
            job.id,
            job.state,
            transition.state,
            transition.reason,
            extra={"job_id": job.id},
        )
        if observation is None:
            return False
        self._last_changes.pop(job.submission_id, None)
        if observation.outcome is None and observation.submission and observation.submission.message:
            message = observation.submission.message
            logger.info("%s: message of Ray: %s", job.id, message, extra={"job_id": job.id})
        if stop:
            await self._ray.stop(job.submission_id)
        if transition.state.is_terminal or transition.state == JobState.QUEUED:
            # Ray may start a submission later than it reports: such a driver finds the attempt closed, and
            # ends. The file is written after the change, which a replica without its lease cannot make; after
            # a crash in between it is written when the job ends or its next attempt is submitted.
            await on_storage(self._files.close_attempts, job)
        return True

    async def _withdraw(self, job: Job, lease: Lease) -> None:
        """Withdraw an attempt that Ray has not started.

        Ray ignores a stop then, and may start it much later.

        Ray reports a job as running before it starts its driver. So a driver whose job is still pending after
        the attempt was closed finds it closed.
        """
        await on_storage(self._files.close_attempts, job)
        submission = await self._ray.find(job.submission_id)
        if submission is not None and submission.status == RayStatus.PENDING:
            transition = (
                Transition(state=JobState.CANCELLED, reason="cancelled before Ray started it")
                if job.cancel_requested
                else after_stop(job, "was not started yet")
            )
            await self._jobs.advance(job, transition, ACTOR, lease)

    def _read_files(self, job: Job) -> tuple[Outcome | None, Progress | None, float | None]:
        return self._files.outcome(job), self._files.progress(job), self._files.last_heartbeat(job)

    def _heartbeat_age(self, job: Job, submission: Submission | None, heartbeat: float | None) -> float:
        """Return the seconds since a heartbeat or Ray's status changed.

        They are measured by the clock of this process.
        """
        now, seen = time.monotonic(), (submission, heartbeat)
        last, since = self._last_changes.setdefault(job.submission_id, (seen, now))
        if last != seen:
            self._last_changes[job.submission_id] = seen, now
            return 0.0
        return now - since
