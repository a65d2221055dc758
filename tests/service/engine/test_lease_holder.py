"""Replicas: division of work, and recovery when one hangs, crashes or returns late."""

import asyncio

import pytest
from sqlalchemy import update

from service.adapters.run_storage import on_storage
from service.domain.errors import UpstreamUnavailable
from service.domain.leases import SHARDS
from service.domain.lifecycle import RayStatus
from service.domain.resources import Resources
from service.domain.scheduling import Policy
from service.engine.lease_holder import LeaseHolder
from service.store.leases import LeaseStore
from service.store.tables import leases
from tests.service.engine.replica_fixture import ReplicaFixture
from trainer.jobspec import CLOSED_FILE, OUTCOME_FILE, Outcome

SUCCEEDED = Outcome(state="succeeded", reason="finished 10 steps")


async def test_replicas_share_the_work_and_one_takes_over_from_the_other(database, tmp_path):
    first = ReplicaFixture(database, tmp_path, name="one")
    second = ReplicaFixture(database, tmp_path, name="two", ray=first.ray, mlflow=first.mlflow)
    first.ray.total = Resources(cpus=50)
    first.policy = second.policy = Policy(max_active=50)
    jobs = [await first.add() for _ in range(20)]
    await first.start()
    await second.start()
    await first.lease_holder.renew()  # releases what is now the other's share
    await second.lease_holder.renew()
    assert first.lease_holder.shards() | second.lease_holder.shards() == set(range(SHARDS))
    assert not first.lease_holder.shards() & second.lease_holder.shards()
    assert (first.lease_holder.scheduler() is None) != (second.lease_holder.scheduler() is None)
    await asyncio.gather(first.tick(), second.tick())
    for job in jobs:
        first.ray.set(job.submission_id, RayStatus.RUNNING)
    await asyncio.gather(first.tick(), second.tick())
    assert {await first.state(job) for job in jobs} == {"running"}
    # One replica freezes and its leases expire; when it continues, it changes nothing.
    held = first.lease_holder._held
    await LeaseStore(database).release("one")
    await second.lease_holder.renew()
    for job in jobs:
        second.write(job, OUTCOME_FILE, SUCCEEDED)
        second.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    first.lease_holder._held = held
    await first.dispatcher.tick(60)
    assert {await first.state(job) for job in jobs} == {"running"}
    await second.tick()
    assert {await first.state(job) for job in jobs} == {"succeeded"}
    assert [len(first.ray.tasks[job.submission_id]) for job in jobs] == [1] * len(jobs)


@pytest.mark.parametrize(
    ("error", "is_stuck"), [(ZeroDivisionError("ours"), True), (UpstreamUnavailable("theirs"), False)]
)
async def test_a_replica_whose_ticks_all_fail_is_reported_as_stuck(replica, monkeypatch, error, is_stuck):
    monkeypatch.setattr("service.engine.dispatcher.MAX_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("service.engine.dispatcher.STUCK_SECONDS", 1.0)
    await replica.start()
    await replica.add()

    async def fail(lease):
        raise error

    failing = pytest.MonkeyPatch()
    failing.setattr(replica.dispatcher._admission, "admit", fail)  # after the jobs were reconciled
    task = asyncio.create_task(replica.dispatcher.run())
    try:
        await asyncio.sleep(0.3)
        assert not replica.dispatcher.is_stuck()
        await asyncio.sleep(1.0)
        assert replica.dispatcher.is_stuck() == is_stuck
        failing.undo()
        async with asyncio.timeout(10):
            while replica.dispatcher.is_stuck():
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_replica_with_hanging_ticks_loses_its_leases(database, tmp_path, monkeypatch):
    monkeypatch.setattr("service.engine.dispatcher.STUCK_SECONDS", 0.2)
    stuck, other = (
        ReplicaFixture(database, tmp_path, name="one"),
        ReplicaFixture(database, tmp_path, name="two"),
    )
    for replica in (stuck, other):
        replica.lease_holder = replica.dispatcher._lease_holder = LeaseHolder(
            LeaseStore(database), replica.name, 0.3
        )
    await stuck.start()
    await stuck.add()
    await stuck.tick()

    async def hang(submission_id):
        await asyncio.Event().wait()

    monkeypatch.setattr(stuck.ray, "find", hang)
    tasks = [
        asyncio.create_task(stuck.dispatcher.run()),
        asyncio.create_task(stuck.lease_holder.run(stuck.dispatcher.is_stuck)),
    ]
    try:
        async with asyncio.timeout(10):
            while len(other.lease_holder.shards()) < SHARDS:
                await asyncio.sleep(0.05)
                await other.lease_holder.renew()
        assert not stuck.lease_holder.is_alive
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_replica_without_its_lease_stops_no_attempt(database, tmp_path, monkeypatch):
    frozen = ReplicaFixture(database, tmp_path, name="one")
    job = await frozen.add()
    await frozen.tick()
    frozen.ray.set(job.submission_id, RayStatus.FAILED, "a passing error")
    advance = frozen.jobs.advance

    async def wake_up_late(*arguments):
        async with database.write() as connection:
            await connection.execute(update(leases).values(token=leases.c.token + 1))
        return await advance(*arguments)

    monkeypatch.setattr(frozen.jobs, "advance", wake_up_late)
    await frozen.tick()
    assert await frozen.state(job) == "submitted"
    assert not (frozen.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_attempts_left_open_by_a_crash_are_closed_later(replica, monkeypatch):
    async def crash(*_):
        raise OSError("killed")

    job = await replica.add()
    await replica.tick()
    policy, replica.policy = replica.policy, Policy(max_active=0)
    with monkeypatch.context() as patched:
        patched.setattr("service.engine.reconciler.on_storage", crash_after_reading(replica, crash))
        replica.ray.set(job.submission_id, RayStatus.FAILED)
        await replica.tick()
    replica.policy = policy
    job = await replica.jobs.get(job.id)
    assert (job.state, job.attempt) == ("queued", 2)
    closed = [replica.files.attempt_folder(job, attempt) / CLOSED_FILE for attempt in (1, 2)]
    assert [file.exists() for file in closed] == [False, False]
    await replica.tick()
    assert [file.exists() for file in closed] == [True, False]
    with monkeypatch.context() as patched:
        patched.setattr("service.engine.reconciler.on_storage", crash_after_reading(replica, crash))
        await replica.jobs.request_cancel(job.id, "ann")
        replica.ray.set(job.submission_id, RayStatus.STOPPED)
        await replica.tick()
    assert await replica.state(job) == "cancelled"
    await replica.tick()
    assert [file.exists() for file in closed] == [True, True]


def crash_after_reading(replica, crash):
    """Let reads of files pass, and make closing of attempts crash."""

    async def work(function, *arguments):
        return await (
            crash() if function == replica.files.close_attempts else on_storage(function, *arguments)
        )

    return work
