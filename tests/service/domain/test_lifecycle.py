import pytest

from service.domain.jobs import JobState, is_legal
from service.domain.lifecycle import RayStatus, Submission, next_step
from tests.service.examples import make_job
from trainer.spec import Outcome

GOOD = Outcome(state="succeeded", reason="finished 10 steps")
BAD = Outcome(state="failed", reason="worker 1: ValueError: no", cause="user_code")
LOST = Outcome(state="failed", reason="worker 1 was lost", cause="worker_lost")


def step(state, status, outcome=None, attempt=1, *, cancel=False):
    job = make_job(state=state, attempt=attempt, cancel_requested=cancel)
    return next_step(job, Submission(RayStatus(status), "Ray's words") if status else None, outcome, 3)


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


def test_a_lost_attempt_is_followed_by_another_up_to_the_limit():
    again = step(JobState.RUNNING, None, attempt=2)
    assert (again.state, again.attempt) == (JobState.QUEUED, 3)
    last = step(JobState.RUNNING, None, attempt=3)
    assert last.state == JobState.FAILED
    assert "last of 3" in last.reason


def test_reasons_say_who_said_so():
    assert step(JobState.RUNNING, "FAILED", BAD).reason == BAD.reason
    assert "Ray's words" in step(JobState.RUNNING, "FAILED").reason
