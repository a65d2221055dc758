"""What a job's next state is, by what Ray and the run's own outcome say; pure."""

from dataclasses import dataclass
from enum import StrEnum

from service.domain.jobs import Job, JobState, Transition
from trainer.spec import Cause, Outcome

RETRIED: frozenset[Cause] = frozenset({"worker_lost", "preempted", "hang"})
"""Causes that another attempt, on other processes and from the last checkpoint, can mend."""


class RayStatus(StrEnum):
    """Ray's states of a submission."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def is_terminal(self) -> bool:
        """Whether the driver has ended."""
        return self not in (RayStatus.PENDING, RayStatus.RUNNING)


@dataclass(frozen=True)
class Submission:
    """What Ray says of one attempt."""

    status: RayStatus
    message: str


def next_step(job: Job, submission: Submission | None, outcome: Outcome | None, max_attempts: int) -> Transition | None:
    """Decide the next transition of a job that was handed to Ray, or none; `submission` is None if Ray does not know it.

    The outcome that the run itself wrote is believed before Ray, whose record is lost with its head. A submitted job that Ray
    does not know is left as it is, to be handed over (again): its submission may never have arrived.
    """
    if submission is not None and not submission.status.is_terminal:
        if submission.status == RayStatus.RUNNING and job.state == JobState.SUBMITTED:
            return Transition(state=JobState.RUNNING, reason=f"attempt {job.attempt} is running")
        return None
    if outcome is not None and outcome.state == "succeeded":
        return Transition(state=JobState.SUCCEEDED, reason=outcome.reason)
    if job.cancel_requested:
        return Transition(state=JobState.CANCELLED, reason="cancelled on request")
    if outcome is not None and outcome.cause not in RETRIED:
        return Transition(state=JobState.FAILED, reason=outcome.reason)
    if outcome is not None:
        return _try_again(job, f"{outcome.cause}: {outcome.reason}", max_attempts)
    if submission is None:
        return _try_again(job, "Ray lost it", max_attempts) if job.state == JobState.RUNNING else None
    if submission.status == RayStatus.STOPPED:
        return Transition(state=JobState.FAILED, reason="stopped in Ray, not through this service")
    what = f"the driver ended without an outcome; Ray says: {submission.message.strip() or submission.status}"
    return _try_again(job, what, max_attempts)


def _try_again(job: Job, what: str, max_attempts: int) -> Transition:
    if job.attempt < max_attempts:
        reason = f"attempt {job.attempt}: {what}; waiting for attempt {job.attempt + 1}"
        return Transition(state=JobState.QUEUED, reason=reason, attempt=job.attempt + 1)
    return Transition(state=JobState.FAILED, reason=f"attempt {job.attempt}, the last of {max_attempts}: {what}")
