"""Jobs, their states and legal transitions."""

import secrets
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from service.domain.resources import Resources, max_resources, min_resources
from service.domain.retries import Failures, JobFailureKind, Retries
from service.domain.scheduling import SchedulableJob
from trainer.jobspec import JobSpec, Progress, spec_warnings


class JobState(StrEnum):
    """States of a job. Requests, such as to cancel it, are flags."""

    QUEUED = "queued"
    SUBMITTED = "submitted"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the state is terminal."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.SUBMITTED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUBMITTED: frozenset(
        {JobState.RUNNING, JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
"""Legal next states of each state; queued means another attempt."""
ACTIVE_STATES = frozenset({JobState.SUBMITTED, JobState.RUNNING})
"""States in which an attempt may be running."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """Job without its spec, which may be large."""

    id: str
    name: str
    owner: str
    """Owner of the token that submitted the job."""
    tags: tuple[str, ...] = ()
    priority: int = 0
    preemptible: bool = False
    """Whether a job of a higher priority may take its resources while it runs."""
    retries: Retries = field(default_factory=Retries)
    secrets: dict[str, str] = field(default_factory=dict)
    """Names of secrets by the environment variables of the workers that hold them; never their values."""
    queue_timeout_seconds: float | None = None
    """Time limit for the start of the first attempt."""
    max_run_seconds: float | None = None
    """Time limit for all attempts together."""
    state: JobState = JobState.QUEUED
    reason: str
    attempt: int = 1
    failures: Failures = field(default_factory=Failures)
    failure_kind: JobFailureKind | None = None
    """Failure kind of the newest attempt that failed; None if none did, or if the job did not fail in the
    end.
    """
    cancel_requested: bool = False
    pause_requested: bool = False
    """Whether the job stays in the queue, or returns to it, until it is resumed."""
    preempted_by: str | None = None
    """Id of the job that preempted the newest attempt or, of a queued job, the one before."""
    stop_requested_at: datetime | None = None
    """Time at which the newest attempt was asked to save a checkpoint and end."""
    comparison_id: str | None = None
    variant: dict[str, Any] = field(default_factory=dict)
    """Values that the matrix of the comparison set in the spec, by path, including the seed."""
    resumed_from: str | None = None
    """Id of the ended job whose checkpoints this one continues from."""
    cloned_from: str | None = None
    progress: Progress | None = None
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    mlflow_closed: bool = False
    """Whether the MLflow run is closed."""
    created_at: datetime
    queued_at: datetime
    """Time at which the newest attempt entered the queue."""
    not_before: datetime | None = None
    """Earliest start of the newest attempt."""
    started_at: datetime | None = None
    """Time at which the newest attempt was first observed running."""
    ran_seconds: float = 0.0
    """Run time of the earlier attempts in seconds."""
    ended_at: datetime | None = None
    version: int = 1
    """Number that increases with each stored change; a change computed from an older version is refused."""

    def seconds_run(self, now: datetime) -> float:
        """Return the total run time of all attempts in seconds."""
        current = (now - self.started_at).total_seconds() if self.started_at and not self.ended_at else 0.0
        return self.ran_seconds + current


@dataclass(frozen=True, kw_only=True)
class JobSummary(JobRecord):
    """Job in lists."""

    norm: str
    seed: int
    steps: int
    max_resources: Resources


@dataclass(frozen=True, kw_only=True)
class Job(JobRecord):
    """Job: one training run that a user submitted."""

    spec: JobSpec

    @property
    def warnings(self) -> list[str]:
        """Warnings about the spec."""
        return spec_warnings(self.spec)

    @property
    def norm(self) -> str:
        """Norm of the spec."""
        return self.spec.norm.value

    @property
    def seed(self) -> int:
        """Seed of the spec."""
        return self.spec.seed

    @property
    def steps(self) -> int:
        """Optimiser steps of the spec."""
        return self.spec.steps

    @property
    def max_resources(self) -> Resources:
        """Resources that the job may hold, of which its usage is computed."""
        return max_resources(self.spec)

    @property
    def queue_until(self) -> datetime | None:
        """End of the queue time limit; None without a limit."""
        # Later attempts are queued by the service; the user's limit is for the first one, without pauses.
        if self.queue_timeout_seconds is None or self.attempt > 1:
            return None
        return self.queued_at + timedelta(seconds=self.queue_timeout_seconds)

    @property
    def submission_id(self) -> str:
        """Submission id of the attempt.

        It is known before Ray is called, so that crashes can be repaired.
        """
        return submission_id(self.id, self.attempt)

    def apply(self, step: "Transition", now: datetime) -> "Job":
        """Return the job after a transition, which must be legal."""
        if not is_legal(self.state, step.state):
            raise AssertionError(f"{self.id}: {self.state} -> {step.state} is no legal transition")
        after = replace(self, state=step.state, reason=step.reason, version=self.version + 1)
        # A success clears the failure kind of earlier attempts.
        if step.failure_kind is not None or step.state.is_terminal:
            after = replace(after, failure_kind=step.failure_kind)
        if step.state == JobState.RUNNING:
            return replace(after, started_at=now)
        if step.state == JobState.SUBMITTED:
            return replace(after, preempted_by=None)
        if step.state == JobState.QUEUED:
            return replace(
                after,
                attempt=self.attempt + 1,
                failures=step.failures or self.failures,
                ran_seconds=self.seconds_run(now),
                # The next attempt may resume at an earlier step than the last progress.
                progress=None,
                started_at=None,
                queued_at=now,
                not_before=step.not_before,
                stop_requested_at=None,
            )
        return replace(
            after,
            ran_seconds=self.seconds_run(now),
            ended_at=now,
            pause_requested=False,
            preempted_by=None,
            stop_requested_at=None,
        )

    def pause(self, now: datetime, actor: str) -> "Job":
        """Return the open job with a request to pause it."""
        if self.state == JobState.QUEUED:
            return replace(self, pause_requested=True, reason=f"paused by {actor}", version=self.version + 1)
        since = self.stop_requested_at or now
        return replace(self, pause_requested=True, stop_requested_at=since, version=self.version + 1)

    def unpause(self, now: datetime, actor: str) -> "Job":
        """Return the job without the request to pause it.

        An attempt that is stopping still ends.
        """
        after = replace(self, pause_requested=False, version=self.version + 1)
        if self.state != JobState.QUEUED:
            return after
        return replace(after, queued_at=now, reason=f"resumed by {actor}")

    def preempt(self, by: str, now: datetime) -> "Job":
        """Return the active job with a request to give its resources to another one."""
        return replace(self, preempted_by=by, stop_requested_at=now, version=self.version + 1)

    def schedulable(self) -> SchedulableJob:
        """Return the job for the scheduler."""
        return SchedulableJob(
            id=self.id,
            owner=self.owner,
            priority=self.priority,
            accelerator_type=self.spec.accelerator_type,
            preemptible=self.preemptible,
            preempted_by=self.preempted_by,
            is_stopping=self.cancel_requested or self.stop_requested_at is not None,
            queued_at=self.queued_at,
            not_before=self.not_before,
            min_resources=min_resources(self.spec),
            max_resources=self.max_resources,
            submission_id=self.submission_id,
        )


@dataclass(frozen=True, kw_only=True)
class Transition:
    """Transition of a job: new state, reason and failure counts."""

    state: JobState
    reason: str
    failure_kind: JobFailureKind | None = None
    failures: Failures | None = None
    """Failure counts including the newest failure, if the job is queued again."""
    not_before: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """Entry of a job's timeline: a transition or a request."""

    sequence: int = 0
    """Number that increases over all events, assigned by the database."""
    job_id: str
    at: datetime
    state: JobState
    reason: str
    actor: str
    """Owner of the token that was used, or part of the service."""
    attempt: int


ADMIN = "admin"
"""Owner of the first token, and of everything that was stored before tokens had owners."""
MAX_NAME_CHARS = 200
"""Maximum length of a job's name."""


def submission_id(job_id: str, attempt: int) -> str:
    """Return the submission id of an attempt."""
    return f"{job_id}-a{attempt}"


def new_id(kind: str) -> str:
    """Return a new id such as `job-3f9c2b7a10de`, safe in URLs and file names."""
    return f"{kind}-{secrets.token_hex(6)}"


def is_legal(before: JobState, after: JobState) -> bool:
    """Return whether a transition from `before` to `after` is legal."""
    return after in TRANSITIONS[before]
