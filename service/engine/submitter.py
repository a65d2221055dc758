"""Start of attempts: MLflow run, mark in the database, submission to Ray."""

import logging
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import Histogram

from service.adapters.mlflow import MlflowRuns
from service.adapters.ray import RayJobs
from service.adapters.run_storage import RunFiles, on_storage
from service.adapters.secret_files import JobSecrets
from service.domain.errors import NotFound, UpstreamRejected
from service.domain.jobs import Job, JobState, Transition
from service.domain.leases import Lease
from service.domain.lifecycle import after_failure
from service.store.comparisons import ComparisonStore
from service.store.credentials import CredentialStore
from service.store.jobs import JobStore
from trainer.jobspec import Allowlist, AttemptContext, AttemptTask

logger = logging.getLogger(__name__)
ACTOR = "dispatcher"
MAX_REFUSALS = 5
"""Number of refusals by Ray or MLflow after which the attempt fails."""
MAX_REMEMBERED_REFUSALS = 10_000
"""Maximum number of submissions whose refusals are counted."""
MAX_ANCESTORS = 20


@dataclass(frozen=True)
class Upstreams:
    """Systems outside the database that hold attempts."""

    ray: RayJobs
    mlflow: MlflowRuns
    files: RunFiles


@dataclass(frozen=True)
class AttemptSettings:
    """Settings of the operator that each attempt gets."""

    mlflow_url: str
    """URL of the service's MLflow proxy from the nodes of the cluster."""
    permissions: Allowlist
    secrets: JobSecrets


class Submitter:
    """Submitter of queued jobs.

    All steps are idempotent, so that a crash in between can be repaired.
    """

    def __init__(
        self,
        jobs: JobStore,
        comparisons: ComparisonStore,
        credentials: CredentialStore,
        upstreams: Upstreams,
        settings: AttemptSettings,
        dispatch_seconds: Histogram,
    ) -> None:
        self._jobs, self._comparisons, self._credentials = jobs, comparisons, credentials
        self._ray, self._mlflow, self._files = upstreams.ray, upstreams.mlflow, upstreams.files
        self._settings, self._dispatch_seconds = settings, dispatch_seconds
        self._refusals: Counter[str] = Counter()

    async def start(self, job: Job, lease: Lease) -> None:
        """Mark a queued job as submitted, and then submit it; no effect if it has changed."""
        if job.state != JobState.QUEUED or job.cancel_requested or job.pause_requested:
            return
        try:
            started = await self._with_run(job, lease)
        except UpstreamRejected as error:
            await self._fail_if_refused_often(job, lease, error)
            return
        transition = Transition(state=JobState.SUBMITTED, reason=f"attempt {job.attempt} goes to Ray")
        submitted = await self._jobs.advance(started, transition, ACTOR, lease) if started else None
        if submitted is not None:
            self._dispatch_seconds.observe((datetime.now(UTC) - job.queued_at).total_seconds())
            await self.submit(submitted, lease)

    async def submit(self, job: Job, lease: Lease) -> None:
        """Submit a job to Ray."""
        # Earlier drivers must stop before this attempt may write, even if Ray starts one of them late.
        await on_storage(self._files.close_attempts, job, job.attempt - 1)
        try:
            context = AttemptContext(
                job_id=job.id,
                attempt=job.attempt,
                name=job.name,
                folder=str(self._files.job_folder(job.id)),
                mlflow_url=self._settings.mlflow_url,
                mlflow_token=await self._mlflow_token(job),
                mlflow_run_id=job.mlflow_run_id,
                permissions=self._settings.permissions,
                secrets=self._settings.secrets.paths(job.secrets),
                resumed_from=await self._ancestors(job),
            )
            task_file = await on_storage(self._files.write_task, AttemptTask(spec=job.spec, context=context))
            await self._ray.submit(job.submission_id, task_file)
        except UpstreamRejected as error:
            await self._fail_if_refused_often(job, lease, error)
        else:
            self._refusals.pop(job.submission_id, None)

    async def _mlflow_token(self, job: Job) -> str:
        """Return the credential of an attempt, from its task file if there is one."""
        # A repeated submission must keep the credential of the driver that may already run.
        task = await on_storage(self._files.task, job)
        token = task.context.mlflow_token if task else None
        grant = await self._credentials.find_grant(token) if token else None
        return (
            token
            if token and grant and grant.job_id == job.id
            else await self._credentials.add_for_attempt(job)
        )

    async def _ancestors(self, job: Job) -> tuple[str, ...]:
        """Return the ids of the jobs that a job may resume from, newest first."""
        found: list[str] = []
        while job.resumed_from is not None and len(found) < MAX_ANCESTORS:
            found.append(job.resumed_from)
            try:
                job = await self._jobs.get(job.resumed_from)
            except NotFound:  # deleted since
                break
        return tuple(found)

    async def _with_run(self, job: Job, lease: Lease) -> Job | None:
        """Ensure that MLflow has a run for the job and its comparison."""
        comparison = await self._comparisons.get(job.comparison_id) if job.comparison_id else None
        if comparison is not None and comparison.mlflow_run_id is None:
            parent = await self._mlflow.start_comparison(comparison)
            await self._comparisons.update_fields(
                comparison.id, mlflow_run_id=parent.run_id, mlflow_experiment_id=parent.experiment_id
            )
            # Read again, with the parent run that `start_job` needs.
            comparison = await self._comparisons.get(comparison.id)
        run = await self._mlflow.start_job(job, comparison)
        return await self._jobs.update_fields(
            job, lease, mlflow_run_id=run.run_id, mlflow_experiment_id=run.experiment_id
        )

    async def _fail_if_refused_often(self, job: Job, lease: Lease, error: UpstreamRejected) -> None:
        self._refusals[job.submission_id] += 1
        if len(self._refusals) > MAX_REMEMBERED_REFUSALS:
            del self._refusals[next(iter(self._refusals))]
        logger.warning("%s: %s", job.id, error, extra={"job_id": job.id})
        if self._refusals[job.submission_id] < MAX_REFUSALS:
            return
        del self._refusals[job.submission_id]
        transition = Transition(state=JobState.FAILED, reason=str(error), failure_kind="rejected")
        if job.state == JobState.SUBMITTED:  # an error of Ray, which may have accepted it all the same
            transition = after_failure(job, "rejected", str(error), datetime.now(UTC))
        await self._jobs.advance(job, transition, ACTOR, lease)
