from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.jobs import JobState, Transition, is_legal
from service.domain.lifecycle import (
    Advance,
    Command,
    Limits,
    Observation,
    RayStatus,
    Submission,
    decide,
    is_overtime,
    next_transition,
)
from service.domain.retries import MAX_PAUSE, Failures, Retries, RetryGroup, pause
from tests.service.examples import make_job
from trainer.jobspec import Outcome

NOW = datetime.now(UTC)
GOOD = Outcome(state="succeeded", reason="finished 10 steps")
BAD = Outcome(state="failed", reason="worker 1: ValueError: no", cause="user_code")
LOST = Outcome(state="failed", reason="worker 1 was lost", cause="worker_lost")


def step(state, status, outcome=None, **changes):
    job = make_job(state=state, **changes)
    return next_transition(
        job, Submission(RayStatus(status), "Ray's words") if status else None, outcome, NOW
    )


@pytest.mark.parametrize(
    ("state", "status", "outcome", "cancel", "after"),
    [
        ("submitted", "PENDING", None, False, None),
        ("submitted", "RUNNING", None, False, "running"),
        ("running", "RUNNING", None, False, None),
        ("running", "RUNNING", GOOD, False, None),
        ("running", "RUNNING", None, True, None),
        ("running", "SUCCEEDED", GOOD, False, "succeeded"),
        ("running", "FAILED", GOOD, False, "succeeded"),
        ("running", "FAILED", BAD, False, "failed"),
        ("running", "FAILED", None, False, "queued"),
        ("running", "SUCCEEDED", None, False, "queued"),
        ("running", "FAILED", LOST, False, "queued"),
        ("running", None, LOST, False, "queued"),
        ("running", "FAILED", LOST, True, "cancelled"),
        ("running", "STOPPED", None, False, "failed"),
        ("running", "STOPPED", None, True, "cancelled"),
        ("running", "FAILED", BAD, True, "cancelled"),
        ("running", "STOPPED", GOOD, True, "succeeded"),
        ("submitted", None, None, False, None),
        ("submitted", None, None, True, "cancelled"),
        ("submitted", None, GOOD, False, "succeeded"),
        ("running", None, None, False, "queued"),
        ("running", None, GOOD, False, "succeeded"),
        ("running", None, BAD, False, "failed"),
        ("running", None, None, True, "cancelled"),
    ],
)
def test_next_transition(state, status, outcome, cancel, after):
    transition = step(JobState(state), status, outcome, cancel_requested=cancel)
    assert (transition.state.value if transition else None) == after
    if transition:
        assert is_legal(JobState(state), transition.state)
        assert transition.reason


def failed(cause):
    return Outcome(state="failed", reason="it ended", cause=cause)


@pytest.mark.parametrize(
    ("cause", "group"),
    [
        ("worker_lost", RetryGroup.INFRASTRUCTURE),
        ("preempted", RetryGroup.PREEMPTED),
        ("hang", RetryGroup.HANG),
        ("unknown", RetryGroup.UNKNOWN),
        ("export", RetryGroup.UNKNOWN),
    ],
)
def test_failures_not_caused_by_the_user_are_retried_up_to_the_limit(cause, group):
    retries = Retries(infrastructure=2, preempted=2, hang=2, unknown=2)
    others = {other: 50 for other in RetryGroup if other != group}
    for before in (0, 1):
        failures = Failures(others | {group: before})
        again = step(JobState.RUNNING, "FAILED", failed(cause), retries=retries, failures=failures)
        assert again.state == JobState.QUEUED
        assert again.failures.counts == others | {group: before + 1}
        assert again.not_before == NOW + pause(before + 1)
    last = step(JobState.RUNNING, "FAILED", failed(cause), retries=retries, failures=Failures({group: 2}))
    assert last.state == JobState.FAILED
    assert f"no retries left for {group}" in last.reason


@pytest.mark.parametrize("cause", ["user_code", "configuration", "data", "out_of_memory"])
def test_failures_caused_by_the_user_are_not_retried(cause):
    assert step(JobState.RUNNING, "FAILED", failed(cause)).state == JobState.FAILED


def test_unknown_failures_are_retried_once():
    again = step(JobState.RUNNING, "FAILED", failed("unknown"))
    assert (again.state, again.failures.counts) == (JobState.QUEUED, {RetryGroup.UNKNOWN: 1})
    assert (
        step(JobState.RUNNING, "FAILED", failed("unknown"), failures=again.failures).state == JobState.FAILED
    )


TAIL = (
    ", last available logs (truncated to 20,000 chars):\nTraceback (most recent call last):\n" + "x" * 1_000
)


@pytest.mark.parametrize(
    ("status", "message", "group", "what"),
    [
        (
            "FAILED",
            f"Job entrypoint command failed with exit code -9{TAIL}",
            RetryGroup.INFRASTRUCTURE,
            "the driver was killed by signal 9 (Killed) and left no outcome",
        ),
        (
            "FAILED",
            f"Job entrypoint command failed with exit code 137{TAIL}",
            RetryGroup.INFRASTRUCTURE,
            "the driver was killed by signal 9 (Killed) and left no outcome",
        ),
        (
            "FAILED",
            f"Job entrypoint command failed with exit code -30{TAIL}",
            RetryGroup.INFRASTRUCTURE,
            "the driver was killed by signal 30 (Power failure) and left no outcome",
        ),
        (
            "FAILED",
            f"Job entrypoint command failed with exit code -11{TAIL}",
            RetryGroup.UNKNOWN,
            "the driver was killed by signal 11 (Segmentation fault) and left no outcome",
        ),
        (
            "FAILED",
            "Job entrypoint command failed with exit code 1. No logs available.",
            RetryGroup.UNKNOWN,
            "the driver ended with status 1 and left no outcome",
        ),
        (
            "FAILED",
            "Job entrypoint command failed with exit code 4. No logs available.",
            RetryGroup.INFRASTRUCTURE,
            "the driver could not write to the storage",
        ),
        (
            "FAILED",
            "Job supervisor actor died: its node has failed",
            RetryGroup.INFRASTRUCTURE,
            "Ray lost the driver, which left no outcome",
        ),
        ("FAILED", "", RetryGroup.UNKNOWN, "the driver left no outcome"),
        ("SUCCEEDED", "", RetryGroup.UNKNOWN, "the driver left no outcome"),
    ],
)
def test_a_driver_without_an_outcome_has_a_reason(status, message, group, what):
    again = next_transition(
        make_job(state=JobState.RUNNING), Submission(RayStatus(status), message), None, NOW
    )
    assert again.failures.counts == {group: 1}
    assert again.reason.startswith(f"attempt 1: {what}; retry 1 of")


def test_retry_delays_grow_up_to_a_limit():
    assert [pause(number).total_seconds() for number in (1, 2, 3)] == [2, 4, 8]
    assert pause(1_000) == MAX_PAUSE


def test_a_job_over_its_time_limit_has_failed_regardless_of_its_outcome():
    started = NOW - timedelta(seconds=6)
    late = {"max_run_seconds": 10.0, "ran_seconds": 5.0, "started_at": started}
    assert is_overtime(make_job(**late), NOW)
    assert not is_overtime(make_job(**late | {"ran_seconds": 3.0}), NOW)
    ended = step(JobState.RUNNING, "STOPPED", **late)
    assert (ended.state, ended.reason) == (JobState.FAILED, "ran longer than its max_run_seconds, 10")
    assert step(JobState.RUNNING, "STOPPED", GOOD, **late).state == JobState.SUCCEEDED


LIMITS = Limits(
    outcome_grace_seconds=5,
    heartbeat_timeout_seconds=60,
    start_timeout_seconds=900,
    stop_grace_seconds=30,
)


def decision(state, status, outcome, age, **changes):
    """Return the name of the command, or state and stop of the transition."""
    submission = Submission(RayStatus(status), "") if status else None
    observation = Observation(submission, outcome, age)
    action = decide(make_job(state=JobState(state), **changes), observation, LIMITS, NOW)
    return (action.transition.state.value, action.stop) if isinstance(action, Advance) else action


CANCEL = {"cancel_requested": True}
SAVED = Outcome(state="failed", reason="stopped on request; saved after 7 steps", cause="preempted")
STOP = {"stop_requested_at": NOW - timedelta(seconds=29)}
LATE = {"stop_requested_at": NOW - timedelta(seconds=30)}
OVERTIME = {"max_run_seconds": 1.0, "ran_seconds": 2.0}


@pytest.mark.parametrize(
    ("state", "status", "outcome", "age", "changes", "expected"),
    [
        ("submitted", "PENDING", None, 900, {}, Command.WAIT),
        ("submitted", "PENDING", None, 901, {}, ("queued", False)),
        ("submitted", "PENDING", None, 901, CANCEL, Command.WITHDRAW),
        ("submitted", "PENDING", None, 0, CANCEL, Command.WITHDRAW),
        ("submitted", "RUNNING", None, 0, {}, ("running", False)),
        ("submitted", "RUNNING", None, 999, {}, ("running", False)),
        ("submitted", None, None, 999, {}, Command.SUBMIT),
        ("submitted", None, None, 4, CANCEL, Command.CLOSE),
        ("submitted", None, None, 5, CANCEL, ("cancelled", False)),
        ("running", "RUNNING", None, 60, {}, Command.WAIT),
        ("running", "RUNNING", None, 61, {}, ("queued", True)),
        ("running", "RUNNING", None, 61, CANCEL, ("cancelled", True)),
        ("running", "RUNNING", None, 0, CANCEL, Command.STOP),
        ("running", "RUNNING", None, 0, OVERTIME, Command.STOP),
        ("running", "RUNNING", GOOD, 5, {}, Command.WAIT),
        ("running", "RUNNING", GOOD, 6, {}, ("succeeded", True)),
        ("running", "RUNNING", BAD, 6, {}, ("failed", True)),
        ("running", "FAILED", None, 4, {}, Command.WAIT),
        ("running", "FAILED", None, 4, OVERTIME, Command.CLOSE),
        ("running", "FAILED", None, 5, {}, ("queued", False)),
        ("running", "FAILED", GOOD, 0, {}, ("succeeded", False)),
        ("running", "STOPPED", None, 0, CANCEL, ("cancelled", False)),
        ("running", None, None, 4, {}, Command.WAIT),
        ("running", None, None, 5, {}, ("queued", False)),
        ("submitted", "PENDING", None, 0, STOP, Command.WITHDRAW),
        ("submitted", None, None, 4, STOP, Command.SAVE),
        ("submitted", None, None, 5, STOP, ("queued", False)),
        ("running", "RUNNING", None, 0, STOP, Command.SAVE),
        ("running", "RUNNING", None, 0, LATE, Command.STOP),
        ("running", "RUNNING", None, 0, STOP | CANCEL, Command.STOP),
        ("running", "RUNNING", None, 0, STOP | OVERTIME, Command.STOP),
        ("running", "RUNNING", None, 61, STOP, ("queued", True)),
        ("running", "RUNNING", SAVED, 6, STOP, ("queued", True)),
        ("running", "FAILED", SAVED, 0, STOP, ("queued", False)),
        ("running", "FAILED", SAVED, 0, STOP | CANCEL, ("cancelled", False)),
        ("running", "FAILED", BAD, 0, STOP, ("failed", False)),
        ("running", "SUCCEEDED", GOOD, 0, STOP, ("succeeded", False)),
        ("running", "STOPPED", None, 0, LATE, ("queued", False)),
        ("running", "FAILED", None, 4, STOP, Command.SAVE),
        ("running", "FAILED", None, 4, LATE, Command.CLOSE),
        ("running", "FAILED", None, 5, STOP, ("queued", False)),
    ],
)
def test_decide_for_a_submitted_attempt(state, status, outcome, age, changes, expected):
    assert decision(state, status, outcome, age, **changes) == expected


def test_a_long_grace_period_does_not_extend_a_lost_attempt():
    limits = replace(LIMITS, outcome_grace_seconds=3_600)
    observation = Observation(Submission(RayStatus.RUNNING, ""), None, 61)
    action = decide(make_job(state=JobState.RUNNING), observation, limits, NOW)
    assert isinstance(action, Advance)
    assert action.stop


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"pause_requested": True}, None, "paused: attempt 1 saved its state"),
        ({"preempted_by": "job-2"}, "preempted", "preempted by job-2: attempt 1 saved its state"),
        ({}, None, "attempt 1 saved its state"),
    ],
)
def test_an_attempt_that_stops_on_request_uses_no_retry(changes, kind, reason):
    job = make_job(state=JobState.RUNNING, **STOP, **changes, retries=Retries(preempted=0))
    transition = next_transition(job, Submission(RayStatus.FAILED, ""), SAVED, NOW)
    assert (transition.failure_kind, transition.reason) == (kind, reason)
    after = job.apply(transition, NOW)
    assert (after.attempt, after.failures, after.not_before) == (2, Failures(), None)
    assert (after.stop_requested_at, after.pause_requested) == (None, job.pause_requested)
    # Nor is a real failure excused by the request.
    lost = next_transition(replace(job, retries=Retries(infrastructure=0)), None, LOST, NOW)
    assert (lost.state, lost.failure_kind) == (JobState.FAILED, "worker_lost")


def test_decide_without_an_attempt():
    assert decide(make_job(), None, LIMITS, NOW) == Command.WAIT
    assert decide(make_job(state=JobState.FAILED), None, LIMITS, NOW) == Command.FINISH_RUN
    cancelled = decide(make_job(cancel_requested=True), None, LIMITS, NOW)
    assert cancelled.transition.state == JobState.CANCELLED
    late = make_job(queue_timeout_seconds=1.0, queued_at=NOW - timedelta(seconds=2))
    timed_out = decide(late, None, LIMITS, NOW)
    assert (timed_out.transition.state, timed_out.transition.failure_kind) == (JobState.FAILED, "time_limit")
    assert decide(replace(late, attempt=2), None, LIMITS, NOW) == Command.WAIT
    assert decide(replace(late, pause_requested=True), None, LIMITS, NOW) == Command.WAIT
    ended = decide(replace(late, pause_requested=True, cancel_requested=True), None, LIMITS, NOW)
    assert ended.transition.state == JobState.CANCELLED


@pytest.mark.parametrize(
    ("status", "outcome", "changes", "kind"),
    [
        ("SUCCEEDED", GOOD, {}, None),
        ("SUCCEEDED", Outcome(state="succeeded", reason="at step 3", cause="diverged"), {}, "diverged"),
        ("FAILED", BAD, {}, "user_code"),
        ("FAILED", LOST, {}, "worker_lost"),
        ("FAILED", None, {}, "worker_lost"),
        (None, None, {}, "worker_lost"),
        ("STOPPED", None, {}, "stopped"),
        ("STOPPED", None, OVERTIME, "time_limit"),
        ("STOPPED", None, CANCEL, None),
    ],
)
def test_a_transition_has_the_failure_kind_as_data(status, outcome, changes, kind):
    assert step(JobState.RUNNING, status, outcome, **changes).failure_kind == kind


def test_a_job_keeps_the_failure_kind_of_an_attempt_until_it_succeeds():
    job = make_job(state=JobState.RUNNING)
    again = job.apply(next_transition(job, None, LOST, NOW), NOW)
    assert (again.state, again.attempt, again.failure_kind) == (JobState.QUEUED, 2, "worker_lost")
    submitted = again.apply(Transition(state=JobState.SUBMITTED, reason="x"), NOW)
    assert (submitted.failure_kind, submitted.version) == ("worker_lost", job.version + 2)
    assert submitted.apply(next_transition(submitted, None, GOOD, NOW), NOW).failure_kind is None


def test_an_illegal_transition_is_an_error():
    with pytest.raises(AssertionError, match="no legal transition"):
        make_job(state=JobState.FAILED).apply(Transition(state=JobState.RUNNING, reason="x"), NOW)
