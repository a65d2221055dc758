import asyncio
import threading
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.leases import SCHEDULER, SHARDS
from service.domain.lifecycle import RayStatus
from service.domain.retries import Retries
from service.domain.scheduling import Capacity
from service.engine.submitter import MOST_REFUSALS
from service.store.leases import LeaseStore
from tests.service.examples import make_comparison, make_job
from trainer.jobspec import OUTCOME_FILE, PROGRESS_FILE, JobSpec, Outcome, Progress

NO_RETRIES = Retries(infrastructure=0)
SUCCEEDED = Outcome(state="succeeded", reason="finished 10 steps")


async def test_a_job_walks_from_the_queue_to_its_end(house):
    job = await house.add()
    await house.round()
    assert await house.state(job) == "submitted"
    (task,) = house.ray.tasks[f"{job.id}-a1"]
    assert task.spec == job.spec
    assert (task.context.attempt, task.context.mlflow_run_id) == (1, f"run-of-{job.id}")
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    house.write(job, PROGRESS_FILE, Progress(step=3, total_steps=10, samples_per_second=9, eta_seconds=1))
    await house.round()
    seen = await house.jobs.get(job.id)
    assert (seen.state, seen.progress.step) == (JobState.RUNNING, 3)
    house.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    house.write(job, OUTCOME_FILE, SUCCEEDED)
    await house.round()
    await house.round()
    seen = await house.jobs.get(job.id)
    assert (seen.state, seen.reason, seen.mlflow_closed) == (JobState.SUCCEEDED, "finished 10 steps", True)
    assert house.mlflow.runs == {f"run-of-{job.id}": "succeeded"}
    assert await house.jobs.open_jobs(range(SHARDS)) == []


async def test_a_replica_that_decides_again_tells_anew_what_another_has_told_meanwhile(house):
    job = await house.add(spec=JobSpec(steps=1, num_workers=30))
    await house.round()
    told = (await house.jobs.get(job.id)).reason
    leases = LeaseStore(house.database)
    await leases.release(house.name)
    other = (await leases.keep("other", 1_000))[SCHEDULER]
    await house.jobs.explain({job.id: "waits for something else"}, other)
    await house.round()
    assert (await house.jobs.get(job.id)).reason == "waits for something else"
    await leases.release("other")
    await house.replica.renew()
    await house.round()
    assert (await house.jobs.get(job.id)).reason == told


async def test_what_is_told_otherwise_is_told_again_in_the_end(house, monkeypatch):
    job = await house.add(spec=JobSpec(steps=1, num_workers=30))
    await house.round()
    told = (await house.jobs.get(job.id)).reason
    await house.jobs.explain({job.id: "waits for something else"}, house.replica.scheduler())
    await house.round()
    assert (await house.jobs.get(job.id)).reason == "waits for something else"
    monkeypatch.setattr("service.engine.admission.FORGET_SECONDS", 0.0)
    await house.round()
    assert (await house.jobs.get(job.id)).reason == told


async def test_jobs_wait_for_room_and_say_so(house):
    first, second, large = [await house.add(spec=JobSpec(steps=1, num_workers=n)) for n in (2, 1, 30)]
    await house.round()
    assert [await house.state(job) for job in (first, second, large)] == ["submitted", "queued", "queued"]
    assert (await house.jobs.get(second.id)).reason == "waits for 1 CPUs"
    assert "the whole cluster has 2 CPUs" in (await house.jobs.get(large.id)).reason
    house.ray.total = Capacity(cpus=33, gpus=0)
    await house.round()
    assert [await house.state(job) for job in (second, large)] == ["submitted", "submitted"]


async def test_cancelling_a_queued_job_needs_neither_ray_nor_mlflow(house):
    house.ray.is_down = house.mlflow.is_down = True
    job = await house.add()
    await house.jobs.request_cancel(job.id, "ann")
    await house.round()
    assert await house.state(job) == "cancelled"
    await house.round()
    assert await house.jobs.open_jobs(range(SHARDS)) == []


async def test_cancelling_a_running_job_stops_it_first(house):
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    await house.jobs.request_cancel(job.id, "ann")
    await house.round()
    assert await house.state(job) == "running"
    await house.round()
    assert await house.state(job) == "cancelled"
    await house.round()
    assert house.mlflow.runs[f"run-of-{job.id}"] == "cancelled"


@pytest.mark.parametrize("down", ["ray", "mlflow"])
async def test_what_is_down_delays_a_job_and_loses_nothing(house, down):
    job = await house.add()
    getattr(house, down).is_down = True
    with pytest.raises(UpstreamUnavailable):
        await house.round()
    seen = await house.jobs.get(job.id)
    assert (seen.state, seen.reason) == (
        JobState.QUEUED,
        "waits for Ray: Ray did not answer" if down == "ray" else "waits: MLflow did not answer",
    )
    getattr(house, down).is_down = False
    await house.round()
    assert await house.state(job) == "submitted"


async def test_a_crash_before_ray_was_told_is_mended(house):
    job = await house.add()
    submit, house.ray.submit = house.ray.submit, None
    with pytest.raises(TypeError):
        await house.round()
    assert await house.state(job) == "submitted"
    house.ray.submit = submit
    house.reopen()
    await house.round()
    assert len(house.ray.tasks[job.submission_id]) == 1


async def test_what_ray_keeps_refusing_fails_in_the_end(house):
    job = await house.add(retries=NO_RETRIES)
    house.ray.refuses = True
    await house.round()
    assert await house.state(job) == "submitted"
    for _ in range(MOST_REFUSALS * (NO_RETRIES.infrastructure + 1) + 2):
        await house.round()
    seen = await house.jobs.get(job.id)
    assert seen.state == JobState.FAILED
    assert "Ray refused the submission with 500; no retries left for infrastructure (0)" in seen.reason


async def test_a_restart_of_the_service_submits_nothing_twice(house):
    job = await house.add()
    for _ in range(3):
        await house.round()
        house.reopen()
    assert len(house.ray.tasks[job.submission_id]) == 1


async def test_a_queued_job_whose_cancelling_came_first_does_not_go_to_ray(house):
    job = await house.add()
    await house.start()
    stale = await house.jobs.request_cancel(job.id, "ann")
    await house.dispatcher._attempts.start(stale, house.replica.scheduler())
    assert house.ray.tasks == {}
    assert house.mlflow.runs == {}


async def test_a_storage_that_hangs_delays_its_job_and_no_other(house, monkeypatch):
    monkeypatch.setattr("service.adapters.run_storage.STORAGE_SECONDS", 0.1)
    bad, good = await house.add(), await house.add()
    await house.round()
    read, ending = house.files.outcome, threading.Event()

    def hang(job):
        if job.id == bad.id:
            ending.wait(5)
        return read(job)

    monkeypatch.setattr(house.files, "outcome", hang)
    for job in (bad, good):
        house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    ending.set()
    assert [await house.state(job) for job in (bad, good)] == ["submitted", "running"]


async def test_who_waits_too_long_in_the_queue_has_failed(house):
    now = datetime.now(UTC)
    late = await house.add(
        spec=JobSpec(steps=1, num_workers=30), queue_seconds=1.0, created_at=now - timedelta(seconds=2)
    )
    again = await house.add(queue_seconds=1.0, created_at=now - timedelta(seconds=2), attempt=2)
    await house.round()
    seen = await house.jobs.get(late.id)
    assert (seen.state, seen.reason.split(";")[0]) == (JobState.FAILED, "waited longer than its queue_seconds, 1")
    assert await house.state(again) == "submitted"


async def test_who_runs_too_long_is_stopped_and_has_failed(house):
    job = await house.add(run_seconds=0.05)
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    await house.round()
    await asyncio.sleep(0.06)
    for _ in range(3):
        await house.round()
    seen = await house.jobs.get(job.id)
    assert (seen.state, seen.reason) == (JobState.FAILED, "ran longer than its run_seconds, 0.05")
    assert house.ray.submissions[job.submission_id].status == RayStatus.STOPPED


async def test_another_attempt_waits_for_its_time(house, monkeypatch):
    monkeypatch.setattr("service.domain.lifecycle.pause", lambda failures: timedelta(seconds=60))
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.FAILED)
    await house.round()
    await house.round()
    seen = await house.jobs.get(job.id)
    assert (seen.state, seen.attempt) == (JobState.QUEUED, 2)
    assert seen.reason.startswith("tried again at")


async def test_a_resumed_job_knows_where_it_comes_from(house):
    first, second = make_job(state=JobState.CANCELLED, mlflow_closed=True), None
    await house.jobs.add(first)
    second = await house.add(resumed_from=first.id, state=JobState.CANCELLED, mlflow_closed=True)
    third = await house.add(resumed_from=second.id)
    await house.round()
    (task,) = house.ray.tasks[third.submission_id]
    assert task.context.resumed_from == (second.id, first.id)


async def test_one_jobs_trouble_does_not_keep_the_others_waiting(house, monkeypatch):
    bad, good = await house.add(), await house.add()
    await house.round()
    find = house.ray.find

    async def find_badly(submission_id):
        if submission_id == bad.submission_id:
            raise PermissionError("outcome.json")
        return await find(submission_id)

    monkeypatch.setattr(house.ray, "find", find_badly)
    house.ray.set(good.submission_id, RayStatus.RUNNING)
    await house.round()
    assert [await house.state(job) for job in (bad, good)] == ["submitted", "running"]


async def test_a_run_that_mlflow_refuses_fails_its_job_and_no_other(house, monkeypatch):
    bad, good = await house.add(), await house.add()
    start = house.mlflow.start_job

    async def start_or_refuse(job, comparison):
        if job.id == bad.id:
            raise UpstreamRejected("MLflow refused: too long")
        return await start(job, comparison)

    monkeypatch.setattr(house.mlflow, "start_job", start_or_refuse)
    for _ in range(MOST_REFUSALS):
        await house.round()
    assert [await house.state(job) for job in (bad, good)] == ["failed", "submitted"]


async def test_a_comparison_has_one_parent_run_that_ends_after_its_jobs(house):
    comparison = make_comparison()
    jobs = [make_job(comparison_id=comparison.id) for _ in range(2)]
    await house.comparisons.add(comparison, jobs)
    await house.round()
    parent = f"run-of-{comparison.id}"
    assert house.mlflow.runs == {parent: "running"} | {f"run-of-{job.id}": "running" for job in jobs}
    for job, status in zip(jobs, (RayStatus.SUCCEEDED, RayStatus.FAILED), strict=True):
        house.ray.set(job.submission_id, status)
    house.write(jobs[0], OUTCOME_FILE, SUCCEEDED)
    house.write(jobs[1], OUTCOME_FILE, Outcome(state="failed", reason="worker 0: ValueError: no", cause="user_code"))
    await house.round()
    await house.round()
    assert house.mlflow.runs[parent] == "failed"
    assert await house.comparisons.open_jobs() == []


async def test_calls_that_hang_hold_up_nothing_else(house, monkeypatch):
    ended, waiting, answers = await house.add(), await house.add(spec=JobSpec(steps=1, num_workers=30)), asyncio.Event()
    await house.round()
    house.ray.set(ended.submission_id, RayStatus.SUCCEEDED)
    house.write(ended, OUTCOME_FILE, SUCCEEDED)

    async def hang(*_):
        await answers.wait()

    monkeypatch.setattr(house.mlflow, "finish", hang)
    monkeypatch.setattr(house.ray, "cluster", hang)
    task = asyncio.create_task(house.dispatcher.run())
    async with asyncio.timeout(10):
        while await house.state(ended) != "succeeded":
            await asyncio.sleep(0.01)
    await house.jobs.request_cancel(waiting.id, "ann")
    house.dispatcher.wake()
    async with asyncio.timeout(2):
        while await house.state(waiting) != "cancelled":
            await asyncio.sleep(0.01)
    assert not house.dispatcher.is_stuck()
    monkeypatch.setattr("service.engine.dispatcher.STUCK_SECONDS", 3.0)  # longer than a round and its rest
    async with asyncio.timeout(10):
        while not house.dispatcher.is_stuck():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not house.dispatcher.is_stuck()


async def test_the_loop_outlives_trouble_and_wakes_when_asked(house):
    house.ray.is_down = True
    await house.start()
    task = asyncio.create_task(house.dispatcher.run())
    settled = house.comparisons.open_jobs
    house.comparisons.open_jobs = None  # a mistake of ours in one round
    job = await house.add()
    house.dispatcher.wake()
    async with asyncio.timeout(10):
        while "waits for Ray" not in (await house.jobs.get(job.id)).reason:
            await asyncio.sleep(0.01)
        house.ray.is_down = False
        house.comparisons.open_jobs = settled
        while await house.state(job) != "submitted":
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_job_without_a_first_step_is_not_counted_twice(house):
    """Its worker has its CPU, which Ray no longer calls free."""
    first = await house.add(spec=JobSpec(steps=1, num_workers=1))
    await house.round()
    second = await house.add(spec=JobSpec(steps=1, num_workers=2))
    house.ray.set(first.submission_id, RayStatus.RUNNING)
    house.ray.free = Capacity(cpus=1)
    third = await house.add(spec=JobSpec(steps=1, num_workers=1))
    await house.round()
    assert (await house.jobs.get(first.id)).progress is None
    assert [await house.state(job) for job in (first, second, third)] == ["running", "queued", "submitted"]
