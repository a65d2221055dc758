"""Decisions about jobs: the next action for a job, from what was observed of it."""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from service.domain.jobs import Job, JobState, Transition
from service.domain.retries import RETRY_GROUPS, JobFailureKind, RetryGroup, pause
from trainer.jobspec import STORAGE_FAILED, STORAGE_FAILURE, Outcome
from trainer.processes import OUTSIDE_SIGNALS, describe_status

EXIT_CODE = re.compile(r"^Job entrypoint command failed with exit code (-?\d+)")


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


@dataclass(frozen=True)
class Observation:
    """Observed state of a submitted attempt."""

    submission: Submission | None
    """Submission as Ray reports it; None if it is unknown to Ray."""
    outcome: Outcome | None
    """Outcome that the run wrote itself, or None."""
    heartbeat_age_seconds: float
    """Seconds since Ray's status or the driver's heartbeat changed last."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Time limits of the operator, in seconds."""

    outcome_grace_seconds: float
    """Time for a heartbeat or an outcome after Ray reported the end of an attempt."""
    heartbeat_timeout_seconds: float
    """Time without a heartbeat after which a running attempt is lost."""
    start_timeout_seconds: float
    """Time for Ray to start a submission."""
    stop_grace_seconds: float
    """Time for a paused or preempted attempt to save a checkpoint and end."""


class Command(StrEnum):
    """Actions that do not change the state of a job."""

    WAIT = "wait"
    SUBMIT = "submit"
    """Submit the attempt to Ray; it may have been submitted before."""
    STOP = "stop"
    """Stop the attempt in Ray."""
    CLOSE = "close"
    """Close the attempt's folder, upon which its driver stops."""
    SAVE = "save"
    """Ask the attempt to save a checkpoint and end."""
    WITHDRAW = "withdraw"
    """Withdraw an attempt that Ray has not started."""
    FINISH_RUN = "finish_run"
    """Close the MLflow run of a job that has ended."""


@dataclass(frozen=True)
class Advance:
    """Action: apply a transition, and stop the attempt in Ray if it may still run."""

    transition: Transition
    stop: bool = False


Action = Command | Advance


def decide(job: Job, observation: Observation | None, limits: Limits, now: datetime) -> Action:
    """Return the next action for a job.

    Args:
        job: the stored job.
        observation: observed state of its attempt; None if the job is queued or has ended.
        limits: time limits of the operator.
        now: the current time.
    """
    if job.state.is_terminal:
        return Command.FINISH_RUN
    if job.state == JobState.QUEUED:
        leaves = _leave_queue(job, now)
        return Command.WAIT if leaves is None else Advance(leaves)
    assert observation is not None
    submission, outcome, age = observation.submission, observation.outcome, observation.heartbeat_age_seconds
    is_pending = submission is not None and submission.status == RayStatus.PENDING
    if is_pending and (job.cancel_requested or job.stop_requested_at is not None):
        return Command.WITHDRAW
    if is_pending and age > limits.start_timeout_seconds:
        what = f"Ray has not started it within {limits.start_timeout_seconds:g} s"
        return Advance(after_failure(job, "not_started", what, now))
    # Ray reports a driver as running for ever whose end it did not see, as after the loss of its head.
    timeout = limits.heartbeat_timeout_seconds if outcome is None else limits.outcome_grace_seconds
    has_started = outcome is not None or job.state == JobState.RUNNING
    is_lost = has_started and submission is not None and not submission.status.is_terminal and age > timeout
    transition = next_transition(job, None if is_lost else submission, outcome, now)
    if transition is None:
        return Command.SUBMIT if submission is None else _while_running(job, limits, now, Command.STOP)
    # An end that only Ray reports is believed after some seconds without a heartbeat: Ray can call a living
    # driver failed, files can arrive late, and a submission whose response was lost can still arrive.
    is_doubtful = outcome is None and not is_lost and not _is_certain(submission)
    if is_doubtful and age < limits.outcome_grace_seconds:
        return _while_running(job, limits, now, Command.CLOSE)
    return Advance(transition, stop=is_lost)


def next_transition(
    job: Job, submission: Submission | None, outcome: Outcome | None, now: datetime
) -> Transition | None:
    """Return the next transition of a submitted job, or None.

    `submission` is None if unknown to Ray.

    The outcome that the run itself wrote is believed before Ray, whose record is lost with its head. A
    submitted job that Ray does not know stays as it is, to be submitted again: its submission may never
    have arrived.
    """
    if submission is not None and not submission.status.is_terminal:
        if submission.status == RayStatus.RUNNING and job.state == JobState.SUBMITTED:
            return Transition(state=JobState.RUNNING, reason=f"attempt {job.attempt} is running")
        return None
    if outcome is not None and outcome.state == "succeeded":
        return Transition(state=JobState.SUCCEEDED, reason=outcome.reason, failure_kind=outcome.cause)
    if job.cancel_requested:
        return Transition(state=JobState.CANCELLED, reason="cancelled on request")
    if is_overtime(job, now):
        return _failed(f"ran longer than its max_run_seconds, {job.max_run_seconds:g}", "time_limit")
    # A failure with another cause is not excused by the request to stop.
    if job.stop_requested_at is not None and (outcome is None or outcome.cause == "preempted"):
        return after_stop(job, "saved its state" if outcome else "ended; its last checkpoint counts")
    if outcome is not None:
        kind = outcome.cause or "user_code"
        is_users = RETRY_GROUPS[kind] == RetryGroup.USER
        return after_failure(job, kind, outcome.reason if is_users else f"{kind}: {outcome.reason}", now)
    if submission is None:
        return (
            after_failure(job, "worker_lost", "Ray lost it", now) if job.state == JobState.RUNNING else None
        )
    if submission.status == RayStatus.STOPPED:
        return _failed("stopped in Ray, not through this service", "stopped")
    return after_failure(job, *explain_driver(submission), now)


def after_stop(job: Job, end: str) -> Transition:
    """Return the transition after an attempt that was paused or preempted.

    It uses no retry.
    """
    what = f"attempt {job.attempt} {end}"
    if job.preempted_by is not None:
        what = f"preempted by {job.preempted_by}: {what}"
    return Transition(
        state=JobState.QUEUED,
        reason=f"paused: {what}" if job.pause_requested else what,
        failure_kind="preempted" if job.preempted_by is not None else None,
    )


def explain_driver(submission: Submission) -> tuple[JobFailureKind, str]:
    """Return failure kind and reason of a driver that left no outcome.

    They are derived from Ray's message.
    """
    if (found := EXIT_CODE.search(submission.message)) is not None:
        status = int(found[1])
        if status == STORAGE_FAILED:
            return "worker_lost", STORAGE_FAILURE
        status = 128 - status if status > 128 else status  # as a shell reports a signal
        kind: JobFailureKind = "worker_lost" if -status in OUTSIDE_SIGNALS else "unknown"
        return kind, f"the driver {describe_status(status)} and left no outcome"
    if submission.status == RayStatus.FAILED and submission.message:  # of Ray's supervisor of the driver
        return "worker_lost", "Ray lost the driver, which left no outcome"
    return "unknown", "the driver left no outcome"


def is_overtime(job: Job, now: datetime) -> bool:
    """Return whether a job has exceeded its run time limit."""
    return job.max_run_seconds is not None and job.seconds_run(now) > job.max_run_seconds


def after_failure(job: Job, kind: JobFailureKind, what: str, now: datetime) -> Transition:
    """Return the transition after a failure.

    The job is queued again if a retry of its group is left.
    """
    group = RETRY_GROUPS[kind]
    if group == RetryGroup.USER:
        return _failed(what, kind)
    failures = job.failures.increment(group)
    count, allowed = failures.of(group), job.retries.allowed(group)
    if count > allowed:
        return _failed(f"attempt {job.attempt}: {what}; no retries left for {group} ({allowed})", kind)
    reason = f"attempt {job.attempt}: {what}; retry {count} of {allowed} for {group} follows"
    return Transition(
        state=JobState.QUEUED,
        reason=reason,
        failure_kind=kind,
        failures=failures,
        not_before=now + pause(count),
    )


def _leave_queue(job: Job, now: datetime) -> Transition | None:
    if job.cancel_requested:
        return Transition(state=JobState.CANCELLED, reason="cancelled while queued")
    if job.pause_requested:
        return None
    if job.queue_until is not None and job.queue_until <= now:
        limit = f"waited longer than its queue_timeout_seconds, {job.queue_timeout_seconds:g}"
        return _failed(f"{limit}; at last: {job.reason}", "time_limit")
    return None


def _while_running(job: Job, limits: Limits, now: datetime, stop: Command) -> Command:
    """Return the command for an attempt that may be running; `stop` ends it at once."""
    if job.cancel_requested or is_overtime(job, now):
        return stop
    if job.stop_requested_at is None:
        return Command.WAIT
    is_late = (now - job.stop_requested_at).total_seconds() >= limits.stop_grace_seconds
    return stop if is_late else Command.SAVE


def _failed(reason: str, kind: JobFailureKind) -> Transition:
    return Transition(state=JobState.FAILED, reason=reason, failure_kind=kind)


def _is_certain(submission: Submission | None) -> bool:
    return submission is not None and (
        not submission.status.is_terminal or submission.status == RayStatus.STOPPED
    )
