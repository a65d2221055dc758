"""Jobs, their states and legal transitions."""

import secrets
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from service.domain.retries import Failures, Retries
from service.domain.scheduling import SchedulableJob, least_needs, most_needs
from trainer.jobspec import JobSpec, Progress


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
"""From each state to those that may follow; back to queued means another attempt."""
ACTIVE_STATES = frozenset({JobState.SUBMITTED, JobState.RUNNING})
"""States in which an attempt may be running."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """Job without its spec, which may be large."""

    id: str
    name: str
    owner: str
    """Whose token submitted it."""
    tags: tuple[str, ...] = ()
    priority: int = 0
    retries: Retries = field(default_factory=Retries)
    secrets: dict[str, str] = field(default_factory=dict)
    """Environment variables of the workers, each with the name of the secret that it holds there; never its value."""
    queue_seconds: float | None = None
    """How long it may wait for its first attempt."""
    run_seconds: float | None = None
    """How long its attempts may run, all together."""
    state: JobState = JobState.QUEUED
    reason: str
    attempt: int = 1
    failures: Failures = field(default_factory=Failures)
    cancel_requested: bool = False
    comparison_id: str | None = None
    variant: dict[str, Any] = field(default_factory=dict)
    """What the comparison's matrix set in this job's spec, the seed included: path to value."""
    resumed_from: str | None = None
    """The ended job whose checkpoints this one goes on from."""
    cloned_from: str | None = None
    progress: Progress | None = None
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    mlflow_closed: bool = False
    """Whether MLflow knows the end of this job's run."""
    created_at: datetime
    queued_at: datetime
    """When it joined the queue, for its newest attempt."""
    not_before: datetime | None = None
    """When its newest attempt may start."""
    started_at: datetime | None = None
    """When its newest attempt was seen running."""
    ran_seconds: float = 0.0
    """How long the attempts before that ran."""
    ended_at: datetime | None = None
    version: int = 1
    """Grows with each stored change; a change that was computed from an older version is refused."""


@dataclass(frozen=True, kw_only=True)
class JobSummary(JobRecord):
    """Job in lists."""

    norm: str
    seed: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Job(JobRecord):
    """Job: one training run that a user submitted."""

    spec: JobSpec

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
    def queue_until(self) -> datetime | None:
        """End of the queue time limit; None without a limit."""
        if self.queue_seconds is None or self.attempt > 1:
            return None
        return self.created_at + timedelta(seconds=self.queue_seconds)

    @property
    def submission_id(self) -> str:
        """Submission id of the attempt, known before Ray is called, so that crashes can be repaired."""
        return submission_id(self.id, self.attempt)

    def seconds_run(self, now: datetime) -> float:
        """Return the total run time of all attempts in seconds."""
        current = (now - self.started_at).total_seconds() if self.started_at and not self.ended_at else 0.0
        return self.ran_seconds + current

    def after(self, step: "Transition", now: datetime) -> "Job":
        """Return the job after a transition, except for its version."""
        after = replace(self, state=step.state, reason=step.reason)
        if step.state == JobState.RUNNING:
            return replace(after, started_at=now)
        if step.state == JobState.QUEUED:
            return replace(
                after,
                attempt=self.attempt + 1,
                failures=step.failures or self.failures,
                ran_seconds=self.seconds_run(now),
                progress=None,
                started_at=None,
                queued_at=now,
                not_before=step.not_before,
            )
        return replace(after, ran_seconds=self.seconds_run(now), ended_at=now) if step.state.is_terminal else after

    def candidate(self) -> SchedulableJob:
        """Return the job for the scheduler."""
        return SchedulableJob(
            id=self.id,
            owner=self.owner,
            priority=self.priority,
            queued_at=self.queued_at,
            not_before=self.not_before,
            least=least_needs(self.spec),
            most=most_needs(self.spec),
            submission_id=self.submission_id,
        )


@dataclass(frozen=True, kw_only=True)
class Transition:
    """Transition of a job: new state, reason and failure counts."""

    state: JobState
    reason: str
    failures: Failures | None = None
    """Back to the queue, for another attempt: what has failed so far, the newest included."""
    not_before: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """Entry of a job's timeline: a transition or a request."""

    sequence: int = 0
    """Grows over all events; the database gives it."""
    job_id: str
    at: datetime
    state: JobState
    reason: str
    actor: str
    """Whose token it was, or the part of the service."""
    attempt: int


ADMIN = "admin"
"""Owner of the first token, and of all that was there before tokens had owners."""
LONGEST_NAME = 200
"""Characters of a job's name."""


def submission_id(job_id: str, attempt: int) -> str:
    """Return the submission id of an attempt."""
    return f"{job_id}-a{attempt}"


def new_id(kind: str) -> str:
    """Return a new id such as `job-3f9c2b7a10de`, safe in URLs and file names."""
    return f"{kind}-{secrets.token_hex(6)}"


def is_legal(before: JobState, after: JobState) -> bool:
    """Return whether a transition from `before` to `after` is legal."""
    return after in TRANSITIONS[before]
