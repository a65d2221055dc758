import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.leases import SHARDS
from service.domain.lifecycle import RayStatus
from service.domain.retries import Retries
from service.engine.submitter import MAX_REFUSALS
from tests.service.engine.outcomes import SUCCEEDED
from tests.service.examples import make_job
from trainer.jobspec import OUTCOME_FILE, PROGRESS_FILE, JobSpec, Progress

NO_RETRIES = Retries(infrastructure=0)


async def test_a_job_advances_from_queued_to_succeeded(replica):
    job = await replica.add()
    await replica.tick()
    assert await replica.state(job) == "submitted"
    (task,) = replica.ray.tasks[f"{job.id}-a1"]
    assert task.spec == job.spec
    assert (task.context.attempt, task.context.mlflow_run_id) == (1, f"run-of-{job.id}")
    replica.ray.set(job.submission_id, RayStatus.RUNNING)
    replica.write(job, PROGRESS_FILE, Progress(step=3, total_steps=10, samples_per_second=9, eta_seconds=1))
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.progress.step) == (JobState.RUNNING, 3)
    replica.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    replica.write(job, OUTCOME_FILE, SUCCEEDED)
    await replica.tick()
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.reason, seen.mlflow_closed) == (JobState.SUCCEEDED, "finished 10 steps", True)
    assert replica.mlflow.runs == {f"run-of-{job.id}": "succeeded"}
    assert await replica.jobs.open_jobs(range(SHARDS)) == []


async def test_cancelling_a_queued_job_needs_neither_ray_nor_mlflow(replica):
    replica.ray.is_down = replica.mlflow.is_down = True
    job = await replica.add()
    await replica.jobs.request_cancel(job.id, "ann")
    await replica.tick()
    assert await replica.state(job) == "cancelled"
    await replica.tick()
    assert await replica.jobs.open_jobs(range(SHARDS)) == []


async def test_cancelling_a_running_job_stops_it_first(replica):
    job = await replica.add_running()
    await replica.jobs.request_cancel(job.id, "ann")
    await replica.tick()
    assert await replica.state(job) == "running"
    await replica.tick()
    assert await replica.state(job) == "cancelled"
    await replica.tick()
    assert replica.mlflow.runs[f"run-of-{job.id}"] == "cancelled"


@pytest.mark.parametrize("down", ["ray", "mlflow"])
async def test_an_unavailable_upstream_delays_a_job_without_loss(replica, down):
    job = await replica.add()
    getattr(replica, down).is_down = True
    with pytest.raises(UpstreamUnavailable):
        await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.reason) == (
        JobState.QUEUED,
        "waits for Ray: Ray did not answer" if down == "ray" else "waits: MLflow did not answer",
    )
    getattr(replica, down).is_down = False
    await replica.tick()
    assert await replica.state(job) == "submitted"


async def test_a_crash_before_the_submission_is_repaired(replica):
    job = await replica.add()
    submit, replica.ray.submit = replica.ray.submit, None
    with pytest.raises(TypeError):
        await replica.tick()
    assert await replica.state(job) == "submitted"
    replica.ray.submit = submit
    replica.reopen()
    await replica.tick()
    assert len(replica.ray.tasks[job.submission_id]) == 1


async def test_a_job_that_ray_keeps_rejecting_fails(replica):
    job = await replica.add(retries=NO_RETRIES)
    replica.ray.refuses = True
    await replica.tick()
    assert await replica.state(job) == "submitted"
    for _ in range(MAX_REFUSALS * (NO_RETRIES.infrastructure + 1) + 2):
        await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert seen.state == JobState.FAILED
    assert "Ray refused the submission with 500; no retries left for infrastructure (0)" in seen.reason


async def test_a_restart_of_the_service_submits_nothing_twice(replica):
    job = await replica.add()
    for _ in range(3):
        await replica.tick()
        replica.reopen()
    assert len(replica.ray.tasks[job.submission_id]) == 1


async def test_a_job_cancelled_first_is_not_submitted(replica):
    job = await replica.add()
    await replica.start()
    stale = await replica.jobs.request_cancel(job.id, "ann")
    await replica.submitter.start(stale, replica.lease_holder.scheduler())
    assert replica.ray.tasks == {}
    assert replica.mlflow.runs == {}


async def test_a_job_over_its_queue_timeout_fails(replica):
    now = datetime.now(UTC)
    late = await replica.add(
        spec=JobSpec(steps=1, num_workers=30),
        queue_timeout_seconds=1.0,
        queued_at=now - timedelta(seconds=2),
    )
    again = await replica.add(queue_timeout_seconds=1.0, queued_at=now - timedelta(seconds=2), attempt=2)
    await replica.tick()
    seen = await replica.jobs.get(late.id)
    assert (seen.state, seen.reason.split(";")[0]) == (
        JobState.FAILED,
        "waited longer than its queue_timeout_seconds, 1",
    )
    assert await replica.state(again) == "submitted"


async def test_a_job_over_its_run_time_is_stopped_and_fails(replica):
    job = await replica.add_running(max_run_seconds=0.05)
    await asyncio.sleep(0.06)
    for _ in range(3):
        await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.reason) == (JobState.FAILED, "ran longer than its max_run_seconds, 0.05")
    assert replica.ray.submissions[job.submission_id].status == RayStatus.STOPPED


async def test_the_next_attempt_waits_for_its_delay(replica, monkeypatch):
    monkeypatch.setattr("service.domain.lifecycle.pause", lambda failures: timedelta(seconds=60))
    job = await replica.add()
    await replica.tick()
    replica.ray.set(job.submission_id, RayStatus.FAILED)
    await replica.tick()
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.attempt) == (JobState.QUEUED, 2)
    assert seen.reason.startswith("tried again at")


async def test_a_resumed_job_refers_to_its_source(replica):
    first, second = make_job(state=JobState.CANCELLED, mlflow_closed=True), None
    await replica.jobs.add(first)
    second = await replica.add(resumed_from=first.id, state=JobState.CANCELLED, mlflow_closed=True)
    third = await replica.add(resumed_from=second.id)
    await replica.tick()
    (task,) = replica.ray.tasks[third.submission_id]
    assert task.context.resumed_from == (second.id, first.id)


async def test_an_error_of_one_job_does_not_delay_others(replica, monkeypatch):
    bad, good = await replica.add(), await replica.add()
    await replica.tick()
    find = replica.ray.find

    async def find_badly(submission_id):
        if submission_id == bad.submission_id:
            raise PermissionError("outcome.json")
        return await find(submission_id)

    monkeypatch.setattr(replica.ray, "find", find_badly)
    replica.ray.set(good.submission_id, RayStatus.RUNNING)
    await replica.tick()
    assert [await replica.state(job) for job in (bad, good)] == ["submitted", "running"]


async def test_a_run_rejected_by_mlflow_fails_only_its_job(replica, monkeypatch):
    bad, good = await replica.add(), await replica.add()
    start = replica.mlflow.start_job

    async def start_or_refuse(job, comparison):
        if job.id == bad.id:
            raise UpstreamRejected("MLflow refused: too long")
        return await start(job, comparison)

    monkeypatch.setattr(replica.mlflow, "start_job", start_or_refuse)
    for _ in range(MAX_REFUSALS):
        await replica.tick()
    assert [await replica.state(job) for job in (bad, good)] == ["failed", "submitted"]


async def test_the_loop_survives_errors_and_wakes_on_request(replica):
    replica.ray.is_down = True
    await replica.start()
    task = asyncio.create_task(replica.dispatcher.run())
    settled = replica.comparisons.open_comparisons
    replica.comparisons.open_comparisons = None  # an internal error in one tick
    job = await replica.add()
    replica.dispatcher.wake()
    async with asyncio.timeout(10):
        while "waits for Ray" not in (await replica.jobs.get(job.id)).reason:
            await asyncio.sleep(0.01)
        replica.ray.is_down = False
        replica.comparisons.open_comparisons = settled
        while await replica.state(job) != "submitted":
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
