"""Jobs, their states, and which transitions are legal; pure."""

import secrets
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from trainer.spec import JobSpec, Progress


class JobState(StrEnum):
    """Facts about a job. A wish, such as to cancel it, is a flag of the job."""

    QUEUED = "queued"
    SUBMITTED = "submitted"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the state never changes again."""
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that a user asked for."""

    id: str
    name: str
    spec: JobSpec
    state: JobState = JobState.QUEUED
    reason: str
    attempt: int = 1
    cancel_requested: bool = False
    comparison_id: str | None = None
    variant: dict[str, Any] = field(default_factory=dict)
    """What the comparison's matrix set in this job's spec, the seed included: path to value."""
    progress: Progress | None = None
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    mlflow_closed: bool = False
    """Whether MLflow knows the end of this job's run."""
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    version: int = 1
    """Grows with each stored change; a change that was computed from an older version is refused."""

    @property
    def submission_id(self) -> str:
        """Ray's name for this attempt: known before Ray is asked, so that a crash in between can be repaired."""
        return f"{self.id}-a{self.attempt}"


@dataclass(frozen=True, kw_only=True)
class Transition:
    """A step of a job's life: what changes, and why."""

    state: JobState
    reason: str
    attempt: int | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """A transition that happened."""

    job_id: str
    at: datetime
    state: JobState
    reason: str
    actor: str
    attempt: int


LONGEST_NAME = 200
"""Characters of a job's name."""


def new_id(kind: str) -> str:
    """Make an identifier such as `job-3f9c2b7a10de`: safe in addresses, file names and Ray's submission ids."""
    return f"{kind}-{secrets.token_hex(6)}"


def is_legal(before: JobState, after: JobState) -> bool:
    """Whether a job may go from `before` to `after`."""
    return after in TRANSITIONS[before]
