"""Replicas: how they share the work, and what becomes of it when one hangs, crashes or comes back late."""

import asyncio

import pytest
from sqlalchemy import update

from service.adapters.run_storage import on_storage
from service.domain.errors import UpstreamUnavailable
from service.domain.leases import SHARDS
from service.domain.lifecycle import RayStatus
from service.domain.scheduling import Capacity, Policy
from service.engine.lease_holder import Replica
from service.store.leases import LeaseStore
from service.store.tables import leases
from tests.service.engine.replica_fixture import House
from trainer.jobspec import CLOSED_FILE, OUTCOME_FILE, Outcome

SUCCEEDED = Outcome(state="succeeded", reason="finished 10 steps")


async def test_replicas_share_the_work_and_one_takes_over_from_the_other(database, tmp_path):
    first = House(database, tmp_path, name="one")
    second = House(database, tmp_path, name="two", ray=first.ray, mlflow=first.mlflow)
    first.ray.total = Capacity(cpus=50)
    first.policy = second.policy = Policy(most_active=50)
    jobs = [await first.add() for _ in range(20)]
    await first.start()
    await second.start()
    await first.replica.renew()  # gives back what is now the other's share
    await second.replica.renew()
    assert first.replica.shards() | second.replica.shards() == set(range(SHARDS))
    assert not first.replica.shards() & second.replica.shards()
    assert (first.replica.scheduler() is None) != (second.replica.scheduler() is None)
    await asyncio.gather(first.round(), second.round())
    for job in jobs:
        first.ray.set(job.submission_id, RayStatus.RUNNING)
    await asyncio.gather(first.round(), second.round())
    assert {await first.state(job) for job in jobs} == {"running"}
    # One of them freezes; its leases run out; when it goes on, it changes nothing.
    held = first.replica._held
    await LeaseStore(database).release("one")
    await second.replica.renew()
    for job in jobs:
        second.write(job, OUTCOME_FILE, SUCCEEDED)
        second.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    first.replica._held = held
    await first.dispatcher.round(60)
    assert {await first.state(job) for job in jobs} == {"running"}
    await second.round()
    assert {await first.state(job) for job in jobs} == {"succeeded"}
    assert [len(first.ray.tasks[job.submission_id]) for job in jobs] == [1] * len(jobs)


@pytest.mark.parametrize(
    ("error", "is_stuck"), [(ZeroDivisionError("ours"), True), (UpstreamUnavailable("theirs"), False)]
)
async def test_a_replica_whose_every_round_fails_by_our_mistake_is_stuck(house, monkeypatch, error, is_stuck):
    monkeypatch.setattr("service.engine.dispatcher.LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("service.engine.dispatcher.STUCK_SECONDS", 0.4)
    await house.start()
    await house.add()

    async def fail(lease):
        raise error

    monkeypatch.setattr(house.dispatcher._admission, "admit", fail)  # after the jobs were looked after
    task = asyncio.create_task(house.dispatcher.run())
    try:
        await asyncio.sleep(0.3)
        assert not house.dispatcher.is_stuck()
        await asyncio.sleep(0.5)
        assert house.dispatcher.is_stuck() == is_stuck
        monkeypatch.undo()
        await asyncio.sleep(0.3)
        assert not house.dispatcher.is_stuck()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_replica_whose_rounds_hang_leaves_its_work_to_others(database, tmp_path, monkeypatch):
    monkeypatch.setattr("service.engine.dispatcher.STUCK_SECONDS", 0.2)
    stuck, other = House(database, tmp_path, name="one"), House(database, tmp_path, name="two")
    for house in (stuck, other):
        house.replica = house.dispatcher._replica = Replica(LeaseStore(database), house.name, 0.3)
    await stuck.start()
    await stuck.add()
    await stuck.round()

    async def hang(submission_id):
        await asyncio.Event().wait()

    monkeypatch.setattr(stuck.ray, "find", hang)
    tasks = [
        asyncio.create_task(stuck.dispatcher.run()),
        asyncio.create_task(stuck.replica.run(stuck.dispatcher.is_stuck)),
    ]
    try:
        async with asyncio.timeout(10):
            while len(other.replica.shards()) < SHARDS:
                await asyncio.sleep(0.05)
                await other.replica.renew()
        assert not stuck.replica.is_alive
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_replica_without_its_lease_ends_no_attempt(database, tmp_path, monkeypatch):
    frozen = House(database, tmp_path, name="one")
    job = await frozen.add()
    await frozen.round()
    frozen.ray.set(job.submission_id, RayStatus.FAILED, "a passing error")
    advance = frozen.jobs.advance

    async def wake_up_late(*arguments):
        async with database.write() as connection:
            await connection.execute(update(leases).values(token=leases.c.token + 1))
        return await advance(*arguments)

    monkeypatch.setattr(frozen.jobs, "advance", wake_up_late)
    await frozen.round()
    assert await frozen.state(job) == "submitted"
    assert not (frozen.files.attempt_folder(job) / CLOSED_FILE).exists()


async def test_what_a_crash_left_open_is_closed_before_the_next_attempt_and_at_the_end(house, monkeypatch):
    async def crash(*_):
        raise OSError("killed")

    job = await house.add()
    await house.round()
    policy, house.policy = house.policy, Policy(most_active=0)
    with monkeypatch.context() as patched:
        patched.setattr("service.engine.dispatcher.on_storage", crash_after_reading(house, crash))
        house.ray.set(job.submission_id, RayStatus.FAILED)
        await house.round()
    house.policy = policy
    job = await house.jobs.get(job.id)
    assert (job.state, job.attempt) == ("queued", 2)
    closed = [house.files.attempt_folder(job, attempt) / CLOSED_FILE for attempt in (1, 2)]
    assert [file.exists() for file in closed] == [False, False]
    await house.round()
    assert [file.exists() for file in closed] == [True, False]
    with monkeypatch.context() as patched:
        patched.setattr("service.engine.dispatcher.on_storage", crash_after_reading(house, crash))
        await house.jobs.request_cancel(job.id, "ann")
        house.ray.set(job.submission_id, RayStatus.STOPPED)
        await house.round()
    assert await house.state(job) == "cancelled"
    await house.round()
    assert [file.exists() for file in closed] == [True, True]


def crash_after_reading(house, crash):
    """Let reading files pass, and closing attempts end in a crash."""

    async def work(function, *arguments):
        return await (crash() if function == house.files.close_attempts else on_storage(function, *arguments))

    return work
