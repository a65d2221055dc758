"""What Ray tells of a run is not always so: the run's own files and signs of life are asked too."""

import asyncio
import json
import os

import pytest

from service.domain.jobs import JobState
from service.domain.lifecycle import RayStatus
from service.domain.retries import Blame, Retries
from trainer.jobspec import CLOSED_FILE, DRIVER_FILE, OUTCOME_FILE, PROGRESS_FILE, Outcome, Progress

SUCCEEDED = Outcome(state="succeeded", reason="finished 10 steps")


async def test_a_running_job_that_ray_lost_gets_another_attempt_and_not_a_third(house):
    job = await house.add(retries=Retries(infrastructure=1))
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    house.ray.lose_everything()
    await house.round()
    again = await house.jobs.get(job.id)
    assert (again.state, again.submission_id) == (JobState.SUBMITTED, f"{job.id}-a2")
    assert house.ray.tasks[again.submission_id][0].context.attempt == 2
    house.ray.set(again.submission_id, RayStatus.RUNNING)
    await house.round()
    house.ray.lose_everything()
    await house.round()
    assert await house.state(job) == "failed"


async def test_a_run_that_ended_while_nobody_looked_is_not_repeated(house):
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    house.write(job, OUTCOME_FILE, SUCCEEDED)
    house.ray.lose_everything()
    await house.round()
    assert await house.state(job) == "succeeded"


async def test_a_torn_outcome_is_not_taken_for_one(house):
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    folder = house.files.attempt_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME_FILE).write_text(json.dumps({"state": "succeeded"}))
    await house.round()
    assert (await house.jobs.get(job.id)).attempt == 2


async def test_a_failure_that_only_ray_tells_of_is_given_time(house):
    house.grace_seconds = 60
    house.reopen()
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    house.ray.set(job.submission_id, RayStatus.FAILED, "the supervisor was lost for a moment")
    await house.round()
    assert await house.state(job) == "running"
    house.write(job, OUTCOME_FILE, SUCCEEDED)
    await house.round()
    assert await house.state(job) == "succeeded"


async def test_signs_of_life_prolong_the_time_that_a_suspect_is_given(house, monkeypatch):
    now = 0.0
    monkeypatch.setattr("service.engine.dispatcher.time.monotonic", lambda: now)
    house.grace_seconds = 10
    house.reopen()
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    house.ray.set(job.submission_id, RayStatus.FAILED, "gone")
    for step in range(3):
        show_life(house, job, step)
        await house.round()
        now += 9
    assert await house.state(job) == "running"
    now += 9
    await house.round()
    assert (await house.jobs.get(job.id)).attempt == 2


def show_life(house, job, time):
    file = house.files.attempt_folder(job) / DRIVER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (time, time))


async def test_what_ray_calls_running_for_ever_is_lost_once_it_is_silent(house, monkeypatch):
    now = 0.0
    monkeypatch.setattr("service.engine.dispatcher.time.monotonic", lambda: now)
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    for second in range(3):
        show_life(house, job, second)
        await house.round()
        now += 50
    assert await house.state(job) == "running"
    now += 50
    await house.round()
    seen = await house.jobs.get(job.id)
    assert (seen.attempt, seen.failures.of(Blame.INFRASTRUCTURE)) == (2, 1)
    assert (house.files.attempt_folder(job) / CLOSED_FILE).exists()


@pytest.mark.parametrize("wish", ["cancel", "run_seconds"])
async def test_a_living_driver_that_ray_calls_failed_is_ended_by_its_closed_attempt(house, wish):
    house.grace_seconds = 60
    house.reopen()
    job = await house.add(run_seconds=0.01 if wish == "run_seconds" else None)
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    await asyncio.sleep(0.02)
    if wish == "cancel":
        await house.jobs.request_cancel(job.id, "ann")
    house.ray.set(job.submission_id, RayStatus.FAILED, "a passing error")
    show_life(house, job, 1)
    await house.round()
    assert await house.state(job) == "running"
    assert (house.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_what_ray_never_starts_is_tried_again(house, monkeypatch):
    now = 0.0
    monkeypatch.setattr("service.engine.dispatcher.time.monotonic", lambda: now)
    job = await house.add()
    await house.round()
    await house.round()
    now += 59
    await house.round()
    assert (await house.state(job), (await house.jobs.get(job.id)).attempt) == ("submitted", 1)
    now += 2
    await house.round()
    assert (await house.jobs.get(job.id)).attempt == 2
    assert (house.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_what_ray_has_not_started_yet_is_cancelled_at_once_and_its_driver_finds_that(house):
    job = await house.add()
    await house.round()
    await house.jobs.request_cancel(job.id, "ann")
    await house.round()
    assert await house.state(job) == "cancelled"
    assert (house.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_what_ray_starts_while_it_is_cancelled_is_stopped(house, monkeypatch):
    job = await house.add()
    await house.round()
    await house.jobs.request_cancel(job.id, "ann")
    close = house.files.close_attempts

    def close_too_late(job):
        monkeypatch.undo()
        house.ray.set(job.submission_id, RayStatus.RUNNING)
        close(job)

    monkeypatch.setattr(house.files, "close_attempts", close_too_late)
    await house.round()
    assert await house.state(job) == "submitted"
    for _ in range(4):
        await house.round()
    assert await house.state(job) == "cancelled"
    assert house.ray.submissions[job.submission_id].status == RayStatus.STOPPED


async def test_a_new_attempt_starts_without_the_progress_of_the_last(house):
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    house.write(job, PROGRESS_FILE, Progress(step=3, total_steps=10, samples_per_second=9, eta_seconds=1))
    await house.round()
    house.ray.lose_everything()
    await house.round()
    assert (await house.jobs.get(job.id)).progress is None


@pytest.mark.parametrize(
    "outcome", [Outcome(state="succeeded", reason="done"), Outcome(state="failed", reason="no", cause="user_code")]
)
async def test_an_outcome_is_believed_though_ray_calls_the_run_running_for_ever(house, monkeypatch, outcome):
    now = 0.0
    monkeypatch.setattr("service.engine.dispatcher.time.monotonic", lambda: now)
    house.grace_seconds = 5
    house.reopen()
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    house.write(job, OUTCOME_FILE, outcome)
    await house.round()
    assert await house.state(job) == "running"
    now += 6
    await house.round()
    assert await house.state(job) == outcome.state
    assert house.ray.submissions[job.submission_id].status == RayStatus.STOPPED
