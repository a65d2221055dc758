from datetime import UTC, datetime, timedelta

import pytest

from service.domain.jobs import JobState, is_legal
from service.domain.lifecycle import RayStatus, Submission, is_overtime, next_step
from service.domain.retries import LONGEST_PAUSE, Blame, Failures, Retries, pause
from tests.service.examples import make_job
from trainer.jobspec import Outcome

NOW = datetime.now(UTC)
GOOD = Outcome(state="succeeded", reason="finished 10 steps")
BAD = Outcome(state="failed", reason="worker 1: ValueError: no", cause="user_code")
LOST = Outcome(state="failed", reason="worker 1 was lost", cause="worker_lost")


def step(state, status, outcome=None, *, cancel=False, **changes):
    job = make_job(state=state, cancel_requested=cancel, **changes)
    return next_step(job, Submission(RayStatus(status), "Ray's words") if status else None, outcome, NOW)


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
def test_next_step(state, status, outcome, cancel, after):
    transition = step(JobState(state), status, outcome, cancel=cancel)
    assert (transition.state.value if transition else None) == after
    if transition:
        assert is_legal(JobState(state), transition.state)
        assert transition.reason


def failed(cause):
    return Outcome(state="failed", reason="it ended", cause=cause)


@pytest.mark.parametrize(
    ("cause", "blame"),
    [
        ("worker_lost", Blame.INFRASTRUCTURE),
        ("preempted", Blame.PREEMPTED),
        ("hang", Blame.HANG),
        ("unknown", Blame.UNKNOWN),
        ("export", Blame.UNKNOWN),
    ],
)
def test_what_is_not_the_users_fault_is_tried_again_as_often_as_it_may(cause, blame):
    retries = Retries(infrastructure=2, preempted=2, hang=2, unknown=2)
    others = {other: 50 for other in Blame if other != blame}
    for before in (0, 1):
        failures = Failures(others | {blame: before})
        again = step(JobState.RUNNING, "FAILED", failed(cause), retries=retries, failures=failures)
        assert again.state == JobState.QUEUED
        assert again.failures.counts == others | {blame: before + 1}
        assert again.not_before == NOW + pause(before + 1)
    last = step(JobState.RUNNING, "FAILED", failed(cause), retries=retries, failures=Failures({blame: 2}))
    assert last.state == JobState.FAILED
    assert f"no retries left for {blame}" in last.reason


@pytest.mark.parametrize("cause", ["user_code", "configuration", "data", "out_of_memory"])
def test_the_users_own_mistakes_are_not_tried_again(cause):
    assert step(JobState.RUNNING, "FAILED", failed(cause)).state == JobState.FAILED


def test_what_is_not_known_is_tried_again_once():
    again = step(JobState.RUNNING, "FAILED", failed("unknown"))
    assert (again.state, again.failures.counts) == (JobState.QUEUED, {Blame.UNKNOWN: 1})
    assert step(JobState.RUNNING, "FAILED", failed("unknown"), failures=again.failures).state == JobState.FAILED


TAIL = ", last available logs (truncated to 20,000 chars):\nTraceback (most recent call last):\n" + "x" * 1_000


@pytest.mark.parametrize(
    ("status", "message", "blame", "what"),
    [
        (
            "FAILED",
            f"Job entrypoint command failed with exit code -9{TAIL}",
            Blame.INFRASTRUCTURE,
            "the driver was killed by signal 9 (Killed) and left no outcome",
        ),
        (
            "FAILED",
            f"Job entrypoint command failed with exit code 137{TAIL}",
            Blame.INFRASTRUCTURE,
            "the driver was killed by signal 9 (Killed) and left no outcome",
        ),
        (
            "FAILED",
            f"Job entrypoint command failed with exit code -11{TAIL}",
            Blame.UNKNOWN,
            "the driver was killed by signal 11 (Segmentation fault) and left no outcome",
        ),
        (
            "FAILED",
            "Job entrypoint command failed with exit code 1. No logs available.",
            Blame.UNKNOWN,
            "the driver ended with status 1 and left no outcome",
        ),
        (
            "FAILED",
            "Job supervisor actor died: its node has failed",
            Blame.INFRASTRUCTURE,
            "Ray lost the driver, which left no outcome",
        ),
        ("FAILED", "", Blame.UNKNOWN, "the driver left no outcome"),
        ("SUCCEEDED", "", Blame.UNKNOWN, "the driver left no outcome"),
    ],
)
def test_a_driver_without_an_outcome_is_explained_in_a_sentence(status, message, blame, what):
    again = next_step(make_job(state=JobState.RUNNING), Submission(RayStatus(status), message), None, NOW)
    assert again.failures.counts == {blame: 1}
    assert again.reason.startswith(f"attempt 1: {what}; retry 1 of")


def test_pauses_grow_up_to_a_limit():
    assert [pause(number).total_seconds() for number in (1, 2, 3)] == [2, 4, 8]
    assert pause(1_000) == LONGEST_PAUSE


def test_a_job_that_ran_too_long_has_failed_whatever_ended_it():
    started = NOW - timedelta(seconds=6)
    late = {"run_seconds": 10.0, "ran_seconds": 5.0, "started_at": started}
    assert is_overtime(make_job(**late), NOW)
    assert not is_overtime(make_job(**late | {"ran_seconds": 3.0}), NOW)
    ended = step(JobState.RUNNING, "STOPPED", **late)
    assert (ended.state, ended.reason) == (JobState.FAILED, "ran longer than its run_seconds, 10")
    assert step(JobState.RUNNING, "STOPPED", GOOD, **late).state == JobState.SUCCEEDED
