"""Reconcile loop that advances unfinished jobs.

A round loads the jobs, asks Ray and the run's files, and stores each step under the guard of the job's version and of this
replica's lease, so that nothing is decided on an old state. No network call is made inside a transaction. A kill between any two
steps is repaired by the next tick: a job is marked as submitted before it is sent to Ray, under a constant submission id.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime

from prometheus_client import Histogram

from service.adapters.mlflow import MlflowRuns
from service.adapters.ray import RayJobs
from service.adapters.run_storage import RunFiles, on_storage
from service.domain.comparisons import Comparison
from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import Job, JobState, Transition
from service.domain.leases import Lease
from service.domain.lifecycle import RayStatus, Submission, after_failure, is_overtime, next_step
from service.domain.retries import Blame
from service.engine.admission import Admission
from service.engine.lease_holder import Replica
from service.engine.metric_alerts import Thresholds
from service.engine.submitter import ACTOR, Submitter
from service.logging import job_in_hand
from service.store.comparisons import ComparisonStore
from service.store.jobs import JobStore
from trainer.jobspec import Outcome, Progress

logger = logging.getLogger(__name__)
RUNNING = (RayStatus.PENDING, RayStatus.RUNNING)
MOST_AT_ONCE = 32
"""Jobs that are worked on side by side."""
STUCK_SECONDS = 180.0
"""Without an end of a round or of a piece of its work, or without a round that has not failed by a mistake of ours."""
ADMISSION = "admission"
"""The piece of work that is not on one job."""
WAIT_SECONDS = 0.5
"""Of a round for its work: what takes longer, as a call that hangs does, goes on beside the next rounds and holds nothing up."""
LONGEST_PAUSE_SECONDS = 5.0
"""Between two rounds while something does not answer."""
SHORTEST_REST_SECONDS = 0.1
"""After a round, before whoever asks for one is heard."""
SECONDS_TO_HEAR = 1.0
"""From the beginning of a round to the end of the rest after it, unless the round itself takes longer."""


class Dispatcher:
    """Dispatcher of jobs, from the queue to their end."""

    def __init__(
        self,
        replica: Replica,
        jobs: JobStore,
        comparisons: ComparisonStore,
        ray: RayJobs,
        mlflow: MlflowRuns,
        files: RunFiles,
        attempts: Submitter,
        admission: Admission,
        thresholds: Thresholds,
        round_seconds: Histogram,
        *,
        poll_seconds: float,
        grace_seconds: float,
        silence_seconds: float,
        start_seconds: float,
    ) -> None:
        self._replica, self._jobs, self._comparisons = replica, jobs, comparisons
        self._ray, self._mlflow, self._files = ray, mlflow, files
        self._attempts, self._admission, self._thresholds = attempts, admission, thresholds
        self._round_seconds = round_seconds
        self._poll_seconds, self._grace_seconds = poll_seconds, grace_seconds
        self._silence_seconds, self._start_seconds = silence_seconds, start_seconds
        self._woken = asyncio.Event()
        self._last_seen: dict[str, tuple[object, float]] = {}
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)
        self._work: dict[str, asyncio.Task[None]] = {}
        """By the job's id, or `ADMISSION`."""
        self._began: dict[str, float] = {}
        """When what is being worked on was begun."""
        self._ended_at = time.monotonic()
        self._failing_since: float | None = None

    def wake(self) -> None:
        """Start the next tick as soon as possible."""
        self._woken.set()

    def is_stuck(self) -> bool:
        """Return whether work hangs, or all ticks have failed, beyond all time limits."""
        since = min(self._ended_at, *self._began.values(), self._failing_since or math.inf)
        return time.monotonic() - since > STUCK_SECONDS

    async def run(self) -> None:
        """Run ticks until cancelled. A failed tick is logged, and the next one retries."""
        try:
            await self._run()
        finally:
            for task in self._work.values():
                task.cancel()
            await asyncio.gather(*self._work.values(), return_exceptions=True)

    async def _run(self) -> None:
        pause = self._poll_seconds
        while True:
            self._woken.clear()
            began = time.monotonic()
            try:
                with self._round_seconds.time():
                    await self.round()
                pause, has_failed = self._poll_seconds, False
            except Exception as error:  # one round's trouble, of whatever kind, must not end all the others
                pause = max(self._poll_seconds, min(2 * pause, LONGEST_PAUSE_SECONDS))
                # Readiness reports an upstream that does not answer, which a restart would not repair; other errors are ours.
                has_failed = not isinstance(error, UpstreamUnavailable)
                logger.warning("round broken off, the next one in %.1f s: %s", pause, error, exc_info=has_failed)
            self._ended_at = time.monotonic()
            self._failing_since = (self._failing_since or began) if has_failed else None
            # However many ask for a round, as each submission does, rounds leave 19 twentieths of the time to others.
            took = self._ended_at - began
            rest = max(min(19 * took, SECONDS_TO_HEAR - took), SHORTEST_REST_SECONDS)
            await asyncio.sleep(rest)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), pause - rest)

    async def round(self, seconds: float = WAIT_SECONDS) -> None:
        """Reconcile all jobs of the leases that this replica holds, within a time limit.

        Raises UpstreamUnavailable if the database or Ray is; the trouble with one job is logged.
        """
        await self._thresholds.refresh()
        for job in await self._jobs.open_jobs(self._replica.shards()):
            if job.id not in self._work:
                self._work[job.id] = asyncio.create_task(self._reconcile(job))
        await self._wait(seconds)
        if (lease := self._replica.scheduler()) is not None and ADMISSION not in self._work:
            self._work[ADMISSION] = asyncio.create_task(self._admit(lease))
            await self._wait(seconds)

    async def _wait(self, seconds: float) -> None:
        """Wait for the work and log its error: an error of one job does not delay the others."""
        if self._work:
            await asyncio.wait(self._work.values(), timeout=seconds)
        ended = {name: task for name, task in self._work.items() if task.done()}
        for name in ended:
            del self._work[name]
        troubles = {
            name: error
            for name, task in ended.items()
            if not task.cancelled() and (error := task.exception()) is not None
        }
        for name, error in troubles.items():
            if name != ADMISSION and isinstance(error, Exception):
                known = isinstance(error, UpstreamUnavailable)
                logger.warning("%s: %s", name, error, exc_info=None if known else error, extra={"job_id": name})
        for name, error in troubles.items():
            if name == ADMISSION or not isinstance(error, Exception):
                raise error

    async def _admit(self, lease: Lease) -> None:
        with self._working_on(ADMISSION):
            await self._admission.admit(lease)
            for comparison in await self._comparisons.open_jobs():
                try:
                    await self._settle_comparison(comparison)
                except UpstreamRejected as error:  # it keeps nobody else waiting
                    logger.warning("%s: %s", comparison.id, error)

    async def _reconcile(self, job: Job) -> None:
        # What waits in the queue takes a statement, and does not wait for those that wait for others.
        async with nullcontext() if job.state == JobState.QUEUED else self._slots:
            lease = self._replica.of_job(job.id)
            if lease is None:
                return
            job_in_hand.set(job.id)
            with self._working_on(job.id):
                await self._advance(job, lease)

    @contextmanager
    def _working_on(self, name: str) -> Iterator[None]:
        self._began[name] = time.monotonic()
        try:
            yield
        finally:
            del self._began[name]

    async def _advance(self, job: Job, lease: Lease) -> None:
        if job.state.is_terminal:
            await self._finalize(job, lease)
        elif job.state != JobState.QUEUED:
            await self._observe(job, lease)
        elif job.cancel_requested:
            step = Transition(state=JobState.CANCELLED, reason="cancelled while queued")
            await self._jobs.advance(job, step, ACTOR, lease)
        elif job.queue_until is not None and job.queue_until <= datetime.now(UTC):
            reason = f"waited longer than its queue_seconds, {job.queue_seconds:g}; at last: {job.reason}"
            await self._jobs.advance(job, Transition(state=JobState.FAILED, reason=reason), ACTOR, lease)

    async def _observe(self, job: Job, lease: Lease) -> None:
        """Observe a job in Ray and its files, and apply the next transition."""
        submission = await self._ray.find(job.submission_id)
        outcome, progress, sign = await on_storage(self._read_files, job)
        await self._thresholds.look(job)
        if progress is not None and progress != job.progress:
            noted = await self._jobs.note(job, lease, progress=progress)
            if noted is None:
                return
            job = noted
        if job.cancel_requested and submission is not None and submission.status == RayStatus.PENDING:
            await self._cancel_before_it_starts(job, lease)
            return
        now = datetime.now(UTC)
        silent_seconds = self._heartbeat_age(job, submission, sign)
        has_begun = outcome is not None or job.state == JobState.RUNNING
        is_silent = silent_seconds > (self._silence_seconds if outcome is None else self._grace_seconds)
        if has_begun and is_silent and submission is not None and submission.status in RUNNING:
            await self._ray.stop(job.submission_id)
            submission = None  # Ray calls it running for ever, as it does after its head was lost
        step = next_step(job, submission, outcome, now)
        if submission is not None and submission.status == RayStatus.PENDING and silent_seconds > self._start_seconds:
            what = f"Ray has not started it within {self._start_seconds:g} s"
            step = after_failure(job, Blame.INFRASTRUCTURE, what, now)
        if step is not None and outcome is None and self._in_grace_period(submission, silent_seconds):
            if job.cancel_requested or is_overtime(job, now):  # Ray would not stop it: it finds this, and stops itself
                await on_storage(self._files.close_attempts, job)
            return
        if step is not None:
            if await self._jobs.advance(job, step, ACTOR, lease):
                if step.state.is_terminal or step.state == JobState.QUEUED:
                    # Ray may start a submission later than it says it would: such a driver finds this, and ends. It is written
                    # after the change, which a replica without its lease cannot make; what a crash leaves out is made up for
                    # when the job is settled, or its next attempt handed over.
                    await on_storage(self._files.close_attempts, job)
                self._last_seen.pop(job.submission_id, None)
                logger.info("%s: %s -> %s: %s", job.id, job.state, step.state, step.reason, extra={"job_id": job.id})
                if outcome is None and submission is not None and submission.message:
                    logger.info("%s: Ray's message: %s", job.id, submission.message, extra={"job_id": job.id})
                self.wake()
        elif submission is None:
            await self._attempts.submit(job, lease)
        elif job.cancel_requested or is_overtime(job, now):
            await self._ray.stop(job.submission_id)

    async def _cancel_before_it_starts(self, job: Job, lease: Lease) -> None:
        """Cancel a job that Ray has not started. Ray ignores a stop then, and may start it much later.

        Ray calls a job running before it starts its driver. So one that is still pending after the attempt was closed finds it so.
        """
        await on_storage(self._files.close_attempts, job)
        submission = await self._ray.find(job.submission_id)
        if submission is not None and submission.status == RayStatus.PENDING:
            step = Transition(state=JobState.CANCELLED, reason="cancelled before Ray started it")
            await self._jobs.advance(job, step, ACTOR, lease)

    def _read_files(self, job: Job) -> tuple[Outcome | None, Progress | None, float | None]:
        return self._files.outcome(job), self._files.progress(job), self._files.sign_of_life(job)

    def _heartbeat_age(self, job: Job, submission: Submission | None, sign: float | None) -> float:
        """Return the age of the last sign of life of Ray or the driver, by this process's clock."""
        now, seen = time.monotonic(), (submission, sign)
        since = self._last_seen.setdefault(job.submission_id, (seen, now))
        if since[0] != seen:
            self._last_seen[job.submission_id] = since = (seen, now)
        return now - since[1]

    def _in_grace_period(self, submission: Submission | None, silent_seconds: float) -> bool:
        """Return whether an end that only Ray reports is still in its grace period.

        Ray can call a living driver failed after trouble of its own, files can arrive late on shared storage, and a submission
        whose answer was lost can still arrive. So such an end is believed after some seconds without a sign of life.
        """
        is_certain = submission is not None and submission.status in (*RUNNING, RayStatus.STOPPED)
        return not is_certain and silent_seconds < self._grace_seconds

    async def _finalize(self, job: Job, lease: Lease) -> None:
        """Set the end of a job in MLflow."""
        if job.mlflow_run_id is not None:
            await on_storage(self._files.close_attempts, job)
            await self._mlflow.finish(job.mlflow_run_id, job.state)
        await self._jobs.note(job, lease, mlflow_closed=True)

    async def _settle_comparison(self, comparison: Comparison) -> None:
        """Set the end of a comparison in MLflow, after all of its jobs: failed if any job failed."""
        jobs = await self._jobs.list_by_comparison(comparison.id)
        if not all(job.mlflow_closed for job in jobs):
            return
        states = {job.state for job in jobs}
        if comparison.mlflow_run_id is not None:
            worst = next(s for s in (JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED) if s in states)
            await self._mlflow.finish(comparison.mlflow_run_id, worst)
        await self._comparisons.note(comparison.id, mlflow_closed=True)
