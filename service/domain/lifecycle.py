"""Next state of a job, from its outcome and Ray's status."""

import re
import signal
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from service.domain.jobs import Job, JobState, Transition
from service.domain.retries import BLAME, Blame, pause
from trainer.jobspec import Outcome
from trainer.processes import describe_status

EXIT_CODE = re.compile(r"^Job entrypoint command failed with exit code (-?\d+)")
OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class RayStatus(StrEnum):
    """States of a submission in Ray."""

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
    """Submission of an attempt, as Ray reports it."""

    status: RayStatus
    message: str


def next_step(job: Job, submission: Submission | None, outcome: Outcome | None, now: datetime) -> Transition | None:
    """Return the next transition of a submitted job, or None; `submission` is None if unknown to Ray.

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
    if is_overtime(job, now):
        return Transition(state=JobState.FAILED, reason=f"ran longer than its run_seconds, {job.run_seconds:g}")
    if outcome is not None:
        blame = BLAME.get(outcome.cause, Blame.USER) if outcome.cause else Blame.USER
        what = outcome.reason if blame == Blame.USER else f"{outcome.cause}: {outcome.reason}"
        return after_failure(job, blame, what, now)
    if submission is None:
        if job.state == JobState.RUNNING:
            return after_failure(job, Blame.INFRASTRUCTURE, "Ray lost it", now)
        return None
    if submission.status == RayStatus.STOPPED:
        return Transition(state=JobState.FAILED, reason="stopped in Ray, not through this service")
    blame, what = explain_driver(submission)
    return after_failure(job, blame, what, now)


def explain_driver(submission: Submission) -> tuple[Blame, str]:
    """Return reason and failure kind of a driver that left no outcome, from Ray's message."""
    if (found := EXIT_CODE.search(submission.message)) is not None:
        status = int(found[1])
        status = 128 - status if status > 128 else status  # as a shell reports a signal
        blame = Blame.INFRASTRUCTURE if -status in OUTSIDE_SIGNALS else Blame.UNKNOWN
        return blame, f"the driver {describe_status(status)} and left no outcome"
    if submission.status == RayStatus.FAILED and submission.message:  # of the job's supervisor, not of the driver
        return Blame.INFRASTRUCTURE, "Ray lost the driver, which left no outcome"
    return Blame.UNKNOWN, "the driver left no outcome"


def is_overtime(job: Job, now: datetime) -> bool:
    """Return whether a job has exceeded its run time limit."""
    return job.run_seconds is not None and job.seconds_run(now) > job.run_seconds


def after_failure(job: Job, blame: Blame, what: str, now: datetime) -> Transition:
    """Return the transition after a failure: queued again if a retry of this kind is left."""
    failures = job.failures.increment(blame)
    count, allowed = failures.of(blame), job.retries.allowed(blame)
    if blame == Blame.USER:
        return Transition(state=JobState.FAILED, reason=what)
    if count > allowed:
        reason = f"attempt {job.attempt}: {what}; no retries left for {blame} ({allowed})"
        return Transition(state=JobState.FAILED, reason=reason)
    reason = f"attempt {job.attempt}: {what}; retry {count} of {allowed} for {blame} follows"
    not_before = now + pause(count)
    return Transition(state=JobState.QUEUED, reason=reason, failures=failures, not_before=not_before)
