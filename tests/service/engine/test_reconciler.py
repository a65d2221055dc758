"""Wrong and missing statuses of Ray: files and heartbeats of the run are read too."""

import asyncio
import json
import os

import pytest

from service.domain.jobs import JobState
from service.domain.lifecycle import RayStatus
from service.domain.retries import Retries, RetryGroup
from trainer.jobspec import (
    CLOSED_FILE,
    DRIVER_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    STOP_FILE,
    Outcome,
    Progress,
)

SUCCEEDED = Outcome(state="succeeded", reason="finished 10 steps")


async def test_a_job_lost_by_ray_gets_exactly_one_more_attempt(replica):
    job = await replica.add(retries=Retries(infrastructure=1))
    await replica.tick()
    replica.ray.set(job.submission_id, RayStatus.RUNNING)
    await replica.tick()
    replica.ray.lose_everything()
    await replica.tick()
    again = await replica.jobs.get(job.id)
    assert (again.state, again.submission_id) == (JobState.SUBMITTED, f"{job.id}-a2")
    assert replica.ray.tasks[again.submission_id][0].context.attempt == 2
    replica.ray.set(again.submission_id, RayStatus.RUNNING)
    await replica.tick()
    replica.ray.lose_everything()
    await replica.tick()
    assert await replica.state(job) == "failed"


async def test_a_run_that_ended_unobserved_is_not_repeated(replica):
    job = await replica.add_running()
    replica.write(job, OUTCOME_FILE, SUCCEEDED)
    replica.ray.lose_everything()
    await replica.tick()
    assert await replica.state(job) == "succeeded"


async def test_an_incomplete_outcome_is_ignored(replica):
    job = await replica.add()
    await replica.tick()
    replica.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    folder = replica.files.attempt_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME_FILE).write_text(json.dumps({"state": "succeeded"}))
    await replica.tick()
    assert (await replica.jobs.get(job.id)).attempt == 2


async def test_a_failure_reported_only_by_ray_has_a_grace_period(replica):
    replica.outcome_grace_seconds = 60
    replica.reopen()
    job = await replica.add_running()
    replica.ray.set(job.submission_id, RayStatus.FAILED, "the supervisor was lost for a moment")
    await replica.tick()
    assert await replica.state(job) == "running"
    replica.write(job, OUTCOME_FILE, SUCCEEDED)
    await replica.tick()
    assert await replica.state(job) == "succeeded"


async def test_heartbeats_extend_the_grace_period(replica, monkeypatch):
    now = 0.0
    monkeypatch.setattr("service.engine.reconciler.time.monotonic", lambda: now)
    replica.outcome_grace_seconds = 10
    replica.reopen()
    job = await replica.add_running()
    replica.ray.set(job.submission_id, RayStatus.FAILED, "gone")
    for step in range(3):
        show_life(replica, job, step)
        await replica.tick()
        now += 9
    assert await replica.state(job) == "running"
    now += 9
    await replica.tick()
    assert (await replica.jobs.get(job.id)).attempt == 2


def show_life(replica, job, time):
    file = replica.files.attempt_folder(job) / DRIVER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (time, time))


@pytest.mark.parametrize("clock", [0, 4_000_000_000])  # of the node: decades behind, and ahead
async def test_a_run_reported_as_running_is_lost_without_heartbeats(replica, monkeypatch, clock):
    now = 0.0
    monkeypatch.setattr("service.engine.reconciler.time.monotonic", lambda: now)
    job = await replica.add_running()
    for second in range(3):
        show_life(replica, job, clock + second)
        await replica.tick()
        now += 50
    assert await replica.state(job) == "running"
    now += 50
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.attempt, seen.failures.of(RetryGroup.INFRASTRUCTURE)) == (2, 1)
    assert (replica.files.attempt_folder(job) / CLOSED_FILE).exists()


@pytest.mark.parametrize("cause", ["cancel", "max_run_seconds"])
async def test_a_live_driver_reported_as_failed_stops_when_its_attempt_is_closed(replica, cause):
    replica.outcome_grace_seconds = 60
    replica.reopen()
    job = await replica.add_running(max_run_seconds=0.01 if cause == "max_run_seconds" else None)
    await asyncio.sleep(0.02)
    if cause == "cancel":
        await replica.jobs.request_cancel(job.id, "ann")
    replica.ray.set(job.submission_id, RayStatus.FAILED, "a passing error")
    show_life(replica, job, 1)
    await replica.tick()
    assert await replica.state(job) == "running"
    assert (replica.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_a_submission_that_ray_never_starts_is_retried(replica, monkeypatch):
    now = 0.0
    monkeypatch.setattr("service.engine.reconciler.time.monotonic", lambda: now)
    job = await replica.add()
    await replica.tick()
    await replica.tick()
    now += 59
    await replica.tick()
    assert (await replica.state(job), (await replica.jobs.get(job.id)).attempt) == ("submitted", 1)
    now += 2
    await replica.tick()
    assert (await replica.jobs.get(job.id)).attempt == 2
    assert (replica.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_a_pending_submission_is_cancelled_immediately_and_its_attempt_closed(replica):
    job = await replica.add()
    await replica.tick()
    await replica.jobs.request_cancel(job.id, "ann")
    await replica.tick()
    assert await replica.state(job) == "cancelled"
    assert (replica.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_a_submission_that_starts_during_cancellation_is_stopped(replica, monkeypatch):
    job = await replica.add()
    await replica.tick()
    await replica.jobs.request_cancel(job.id, "ann")
    close = replica.files.close_attempts

    def close_too_late(job):
        monkeypatch.undo()
        replica.ray.set(job.submission_id, RayStatus.RUNNING)
        close(job)

    monkeypatch.setattr(replica.files, "close_attempts", close_too_late)
    await replica.tick()
    assert await replica.state(job) == "submitted"
    for _ in range(4):
        await replica.tick()
    assert await replica.state(job) == "cancelled"
    assert replica.ray.submissions[job.submission_id].status == RayStatus.STOPPED


async def test_a_new_attempt_starts_without_progress(replica):
    job = await replica.add()
    await replica.tick()
    replica.ray.set(job.submission_id, RayStatus.RUNNING)
    replica.write(job, PROGRESS_FILE, Progress(step=3, total_steps=10, samples_per_second=9, eta_seconds=1))
    await replica.tick()
    replica.ray.lose_everything()
    await replica.tick()
    assert (await replica.jobs.get(job.id)).progress is None


@pytest.mark.parametrize(
    "outcome",
    [Outcome(state="succeeded", reason="done"), Outcome(state="failed", reason="no", cause="user_code")],
)
async def test_an_outcome_overrides_a_running_status_of_ray(replica, monkeypatch, outcome):
    now = 0.0
    monkeypatch.setattr("service.engine.reconciler.time.monotonic", lambda: now)
    replica.outcome_grace_seconds = 5
    replica.reopen()
    job = await replica.add_running()
    replica.write(job, OUTCOME_FILE, outcome)
    await replica.tick()
    assert await replica.state(job) == "running"
    now += 6
    await replica.tick()
    assert await replica.state(job) == outcome.state
    assert replica.ray.submissions[job.submission_id].status == RayStatus.STOPPED


async def test_a_paused_attempt_that_does_not_stop_is_stopped(replica):
    """For example one of an earlier version, which does not know the request."""
    replica.stop_grace_seconds = 0.2
    replica.reopen()
    job = await replica.add_running()
    await replica.jobs.request_pause(job.id, "ann")
    await replica.tick()
    assert (replica.files.attempt_folder(job) / STOP_FILE).exists()
    assert replica.ray.submissions[job.submission_id].status == RayStatus.RUNNING
    await asyncio.sleep(0.2)
    await replica.tick()
    assert replica.ray.submissions[job.submission_id].status == RayStatus.STOPPED
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.attempt, seen.pause_requested) == (JobState.QUEUED, 2, True)
    assert seen.reason == "paused: attempt 1 ended; its last checkpoint counts"
    await replica.tick()
    assert await replica.state(job) == "queued"


async def test_a_pending_submission_is_withdrawn_when_its_job_is_paused(replica):
    job = await replica.add()
    await replica.tick()
    await replica.jobs.request_pause(job.id, "ann")
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.attempt) == (JobState.QUEUED, 2)
    assert (replica.files.attempt_folder(job) / CLOSED_FILE).exists()
    await replica.jobs.request_unpause(job.id, "ann")
    await replica.tick()
    assert await replica.state(job) == "submitted"


async def test_a_job_that_is_resumed_while_it_stops_has_another_attempt(replica):
    job = await replica.add_running()
    await replica.jobs.request_pause(job.id, "ann")
    await replica.jobs.request_unpause(job.id, "ann")
    await replica.tick()
    replica.write(job, OUTCOME_FILE, Outcome(state="failed", reason="saved", cause="preempted"))
    replica.ray.set(job.submission_id, RayStatus.FAILED)
    await replica.tick()
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.attempt, seen.failures.counts) == (JobState.SUBMITTED, 2, {})
