"""The dispatcher: looks at every job that is not settled, and does what brings it on.

One round loads the jobs, asks Ray and the run's files, and stores each step under the guard of the job's version, so that nothing
is decided on an old state. No network call is made inside a transaction. A kill between any two steps is mended by the next round:
a job is marked as submitted before Ray is told, under a submission id that does not change.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any

from service.domain.comparisons import Comparison
from service.domain.errors import Refused, Unavailable
from service.domain.jobs import Job, JobState, Transition
from service.domain.lifecycle import RayStatus, Submission, next_step
from service.domain.scheduling import Capacity, fits, needs, next_job
from service.engine.mlflow_runs import MlflowRuns
from service.engine.ray_jobs import RayJobs
from service.engine.run_files import RunFiles
from service.store.comparisons import ComparisonStore
from service.store.jobs import JobStore
from trainer.spec import Permissions, RunContext, Task

logger = logging.getLogger(__name__)
ACTOR = "dispatcher"
ACTIVE = (JobState.SUBMITTED, JobState.RUNNING)
RUNNING = (RayStatus.PENDING, RayStatus.RUNNING)
MOST_REFUSALS = 5
"""Times that Ray may refuse a submission, or MLflow a run, before the job fails."""
LONGEST_PAUSE_SECONDS = 5.0
"""Between two rounds while something does not answer."""


class Dispatcher:
    """Brings jobs from the queue to their end."""

    def __init__(
        self,
        jobs: JobStore,
        comparisons: ComparisonStore,
        ray: RayJobs,
        mlflow: MlflowRuns,
        files: RunFiles,
        *,
        mlflow_url: str,
        permissions: Permissions,
        poll_seconds: float,
        max_active_jobs: int,
        max_attempts: int,
        grace_seconds: float,
    ) -> None:
        self._jobs, self._comparisons = jobs, comparisons
        self._ray, self._mlflow, self._files = ray, mlflow, files
        self._mlflow_url, self._poll_seconds = mlflow_url, poll_seconds
        self._permissions = permissions
        self._max_active_jobs, self._max_attempts = max_active_jobs, max_attempts
        self._woken = asyncio.Event()
        self._refusals: Counter[str] = Counter()
        self._grace_seconds = grace_seconds
        self._suspects: dict[str, tuple[object, float]] = {}

    def wake(self) -> None:
        """Start the next round now: something was asked for."""
        self._woken.set()

    async def run(self) -> None:
        """Run rounds until cancelled. A round that fails is logged, and the next one tries again."""
        pause = self._poll_seconds
        while True:
            self._woken.clear()
            try:
                await self.round()
                pause = self._poll_seconds
            except Exception as error:  # one round's trouble, of whatever kind, must not end all the others
                pause = max(self._poll_seconds, min(2 * pause, LONGEST_PAUSE_SECONDS))
                known = isinstance(error, Unavailable)
                logger.warning("round broken off, the next one in %.1f s: %s", pause, error, exc_info=not known)
            try:
                await asyncio.wait_for(self._woken.wait(), pause)
            except TimeoutError:
                continue

    async def round(self) -> None:
        """Do all that can be done now."""
        unsettled = await self._jobs.unsettled()
        await self._each(unsettled, [self._look_after(job) for job in unsettled])
        await self._submit_what_fits(await self._jobs.unsettled())
        for comparison in await self._comparisons.unsettled():
            await self._settle_comparison(comparison)

    async def _each(self, jobs: Sequence[Job], work: Sequence[Awaitable[None]]) -> None:
        """Work on jobs side by side; trouble with one is logged and does not keep the others waiting."""
        for job, result in zip(jobs, await asyncio.gather(*work, return_exceptions=True), strict=True):
            if isinstance(result, Exception):
                known = isinstance(result, Unavailable)
                logger.warning("%s: %s", job.id, result, exc_info=None if known else result)
            elif result is not None:
                raise result

    async def _look_after(self, job: Job) -> None:
        if job.state.is_terminal:
            await self._settle(job)
        elif job.state in ACTIVE:
            await self._observe(job)
        elif job.cancel_requested:
            await self._jobs.advance(job, Transition(state=JobState.CANCELLED, reason="cancelled while queued"), ACTOR)

    async def _observe(self, job: Job) -> None:
        """Compare a job with what Ray and its files say, and take the step that follows."""
        submission = await self._ray.find(job.submission_id)
        outcome = await asyncio.to_thread(self._files.outcome, job)
        progress = await asyncio.to_thread(self._files.progress, job)
        if progress is not None and progress != job.progress:
            noted = await self._jobs.note(job, progress=progress)
            if noted is None:
                return
            job = noted
        step = next_step(job, submission, outcome, self._max_attempts)
        if step is not None and outcome is None and self._may_still_speak(job, submission):
            return
        if step is not None:
            if await self._jobs.advance(job, step, ACTOR):
                logger.info("%s: %s -> %s: %s", job.id, job.state, step.state, step.reason)
                self.wake()
        elif submission is None:
            await self._hand_over(job)
        elif job.cancel_requested:
            await self._ray.stop(job.submission_id)

    def _may_still_speak(self, job: Job, submission: Submission | None) -> bool:
        """Whether an end that only Ray tells of, or concludes nothing from, is to be given time.

        Ray can call a living driver failed after trouble of its own, files can arrive late on shared storage, and a submission
        whose answer was lost can still arrive. So such an end is believed after some seconds without progress.
        """
        is_certain = submission is not None and submission.status in (*RUNNING, RayStatus.STOPPED)
        if is_certain or (submission is None and job.state == JobState.RUNNING):
            return False
        now = time.monotonic()
        seen = (submission, job.progress)
        since = self._suspects.setdefault(job.submission_id, (seen, now))
        if since[0] != seen:
            self._suspects[job.submission_id] = since = (seen, now)
        return now - since[1] < self._grace_seconds

    async def _submit_what_fits(self, unsettled: Sequence[Job]) -> None:
        """Submit queued jobs, one after the other, as long as there is room."""
        queued = [job for job in unsettled if job.state == JobState.QUEUED and not job.cancel_requested]
        active = [job for job in unsettled if job.state in ACTIVE]
        if not queued:
            return
        try:
            capacity = await self._ray.capacity()
            while job := next_job(queued, active, capacity, self._max_active_jobs):
                queued.remove(job)
                try:
                    submitted = await self._submit(job)
                except Refused as error:
                    await self._fail_if_refused_often(job, error)
                    continue
                if submitted is not None:
                    active.append(submitted)
            for job in queued:
                await self._explain(job, _reason_to_wait(job, capacity))
        except Unavailable as error:
            for job in await self._jobs.unsettled():
                if job.state == JobState.QUEUED:
                    await self._explain(job, f"waiting: {error}")
            raise

    async def _submit(self, job: Job) -> Job | None:
        """Mark one job as submitted, and only then hand it to Ray; None if it has changed meanwhile."""
        started = await self._with_run(job)
        step = Transition(state=JobState.SUBMITTED, reason=f"attempt {job.attempt} goes to Ray")
        submitted = await self._jobs.advance(started, step, ACTOR) if started else None
        if submitted is not None:
            await self._hand_over(submitted)
        return submitted

    async def _explain(self, job: Job, reason: str) -> None:
        """Keep the reason of a queued job true."""
        if job.reason != reason:
            await self._jobs.note(job, reason=reason)

    async def _with_run(self, job: Job) -> Job | None:
        """See to it that MLflow has a run for the job, and for its comparison."""
        comparison = await self._comparisons.get(job.comparison_id) if job.comparison_id else None
        if comparison is not None and comparison.mlflow_run_id is None:
            parent = await self._mlflow.start_comparison(comparison)
            await self._comparisons.note(
                comparison.id, mlflow_run_id=parent.run_id, mlflow_experiment_id=parent.experiment_id
            )
            comparison = await self._comparisons.get(comparison.id)
        run = await self._mlflow.start_job(job, comparison)
        return await self._jobs.note(job, mlflow_run_id=run.run_id, mlflow_experiment_id=run.experiment_id)

    async def _hand_over(self, job: Job) -> None:
        """Give a submitted job to Ray."""
        context = RunContext(
            job_id=job.id,
            attempt=job.attempt,
            name=job.name,
            folder=str(self._files.job_folder(job)),
            mlflow_url=self._mlflow_url,
            mlflow_run_id=job.mlflow_run_id,
            permissions=self._permissions,
        )
        try:
            await self._ray.submit(job.submission_id, Task(spec=job.spec, context=context))
        except Refused as error:
            await self._fail_if_refused_often(job, error)

    async def _fail_if_refused_often(self, job: Job, error: Refused) -> None:
        self._refusals[job.submission_id] += 1
        logger.warning("%s: %s", job.id, error)
        if self._refusals[job.submission_id] >= MOST_REFUSALS:
            await self._jobs.advance(job, Transition(state=JobState.FAILED, reason=str(error)), ACTOR)

    async def _settle(self, job: Job) -> None:
        """Tell MLflow how a job ended."""
        if job.mlflow_run_id is not None:
            await self._mlflow.finish(job.mlflow_run_id, job.state)
        changes: dict[str, Any] = {"mlflow_closed": True}
        await self._jobs.note(job, **changes)

    async def _settle_comparison(self, comparison: Comparison) -> None:
        """Tell MLflow that a comparison has ended, once all of its jobs have: as failed if any of them did."""
        states = {job.state for job in await self._jobs.of_comparison(comparison.id)}
        if not all(state.is_terminal for state in states):
            return
        if comparison.mlflow_run_id is not None:
            worst = next(s for s in (JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED) if s in states)
            await self._mlflow.finish(comparison.mlflow_run_id, worst)
        await self._comparisons.note(comparison.id, mlflow_closed=True)


def _reason_to_wait(job: Job, capacity: Capacity) -> str:
    need = needs(job.spec)
    wanted = f"{need.cpus:g} CPUs" + (f" and {need.gpus:g} GPUs" if need.gpus else "")
    if fits(job.spec, capacity):
        return f"attempt {job.attempt} waits for {wanted}"
    return f"needs {wanted}, but the whole cluster has {capacity.cpus:g} CPUs and {capacity.gpus:g} GPUs"
