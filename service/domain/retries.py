"""Retries of attempts: which failures, how often, with which pauses."""

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Literal

from pydantic import Field

from trainer.jobspec import FailureKind, FrozenModel

FIRST_PAUSE, MAX_PAUSE = timedelta(seconds=2), timedelta(minutes=5)
"""First and longest pause before another attempt."""

JobFailureKind = FailureKind | Literal["not_started", "rejected", "stopped", "time_limit"]
"""Failure kinds that the trainer reports, and those that only the service sees.

`not_started`: Ray did not start the attempt in time. `rejected`: Ray or MLflow refused it. `stopped`: it was
stopped in Ray, not through this service. `time_limit`: a time limit of the job was exceeded.
"""


class RetryGroup(StrEnum):
    """Failure kinds that share a number of retries."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    PREEMPTED = "preempted"
    HANG = "hang"
    UNKNOWN = "unknown"


RETRY_GROUPS: dict[JobFailureKind, RetryGroup] = {
    "user_code": RetryGroup.USER,
    "configuration": RetryGroup.USER,
    "data": RetryGroup.USER,
    "out_of_memory": RetryGroup.USER,
    "diverged": RetryGroup.USER,
    "stopped": RetryGroup.USER,
    "time_limit": RetryGroup.USER,
    "worker_lost": RetryGroup.INFRASTRUCTURE,
    "not_started": RetryGroup.INFRASTRUCTURE,
    "rejected": RetryGroup.INFRASTRUCTURE,
    "preempted": RetryGroup.PREEMPTED,
    "hang": RetryGroup.HANG,
    "export": RetryGroup.UNKNOWN,
    "unknown": RetryGroup.UNKNOWN,
}


class Retries(FrozenModel):
    """Numbers of retries per group. Failures of the user are not retried."""

    infrastructure: int = Field(5, ge=0, le=1_000, description="after a lost worker, driver, node or cluster")
    preempted: int = Field(100, ge=0, le=10_000, description="after a node was taken away with notice")
    hang: int = Field(2, ge=0, le=1_000, description="after workers timed out waiting for each other")
    unknown: int = Field(
        1,
        ge=0,
        le=1_000,
        description="after a failure whose cause is not known, or of the export of a finished run",
    )

    def allowed(self, group: RetryGroup) -> int:
        """Return the number of retries of a group."""
        return 0 if group == RetryGroup.USER else int(getattr(self, group.value))


def pause(failures: int) -> timedelta:
    """Return the pause after a number of failures of one group.

    It is exponential, up to a limit.
    """
    # The exponent is bounded so that many failures do not overflow timedelta.
    return min(FIRST_PAUSE * int(2 ** min(failures - 1, 16)), MAX_PAUSE)


@dataclass(frozen=True)
class Failures:
    """Numbers of failures so far per group."""

    counts: dict[RetryGroup, int] = field(default_factory=dict)

    def increment(self, group: RetryGroup) -> "Failures":
        """Return the numbers with one more failure."""
        return Failures(self.counts | {group: self.counts.get(group, 0) + 1})

    def of(self, group: RetryGroup) -> int:
        """Return the number of failures of one group."""
        return self.counts.get(group, 0)
