import asyncio
import threading

import pytest

from service.domain.lifecycle import RayStatus
from tests.service.engine.outcomes import SUCCEEDED
from trainer.jobspec import OUTCOME_FILE, JobSpec


async def test_hanging_storage_delays_only_its_job(replica, monkeypatch):
    monkeypatch.setattr("service.adapters.run_storage.STORAGE_SECONDS", 0.1)
    bad, good = await replica.add(), await replica.add()
    await replica.tick()
    read, ending = replica.files.outcome, threading.Event()

    def hang(job):
        if job.id == bad.id:
            ending.wait(5)
        return read(job)

    monkeypatch.setattr(replica.files, "outcome", hang)
    for job in (bad, good):
        replica.ray.set(job.submission_id, RayStatus.RUNNING)
    await replica.tick()
    ending.set()
    assert [await replica.state(job) for job in (bad, good)] == ["submitted", "running"]


async def test_hanging_calls_do_not_delay_others(replica, monkeypatch):
    ended, waiting, answers = (
        await replica.add(),
        await replica.add(spec=JobSpec(steps=1, num_workers=30)),
        asyncio.Event(),
    )
    await replica.tick()
    replica.ray.set(ended.submission_id, RayStatus.SUCCEEDED)
    replica.write(ended, OUTCOME_FILE, SUCCEEDED)

    async def hang(*_):
        await answers.wait()

    monkeypatch.setattr(replica.mlflow, "finish", hang)
    monkeypatch.setattr(replica.ray, "cluster", hang)
    task = asyncio.create_task(replica.dispatcher.run())
    async with asyncio.timeout(10):
        while await replica.state(ended) != "succeeded":
            await asyncio.sleep(0.01)
    await replica.jobs.request_cancel(waiting.id, "ann")
    replica.dispatcher.wake()
    async with asyncio.timeout(2):
        while await replica.state(waiting) != "cancelled":
            await asyncio.sleep(0.01)
    assert not replica.dispatcher.is_stuck()
    monkeypatch.setattr("service.engine.dispatcher.STUCK_SECONDS", 3.0)  # longer than a tick and its pause
    async with asyncio.timeout(10):
        while not replica.dispatcher.is_stuck():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not replica.dispatcher.is_stuck()
