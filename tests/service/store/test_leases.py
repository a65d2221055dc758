import asyncio

import pytest

from service.domain.jobs import JobState, Transition
from service.domain.leases import LEASES, SCHEDULER, share_of
from service.store.jobs import JobStore
from service.store.leases import LeaseStore
from tests.service.examples import make_job


@pytest.fixture
def leases(database):
    return LeaseStore(database)


def test_lease_shares_are_even_and_complete():
    for count in range(1, 12):
        names = [f"replica-{number}" for number in range(count)]
        shares = [share_of(name, names) for name in names]
        assert sorted(lease for share in shares for lease in share) == sorted(LEASES)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


async def test_one_replica_holds_everything_and_keeps_its_tokens(leases):
    first = await leases.keep("one", 10)
    assert first.keys() == set(LEASES)
    assert await leases.keep("one", 10) == first


async def test_a_held_lease_moves_only_after_release(leases):
    first = await leases.keep("one", 10)
    assert await leases.keep("two", 10) == {}
    kept = await leases.keep("one", 10)
    given = await leases.keep("two", 10)
    assert kept.keys() | given.keys() == set(LEASES)
    assert not kept.keys() & given.keys()
    assert all(lease.token == first[name].token for name, lease in kept.items())
    assert all(lease.token == first[name].token + 1 for name, lease in given.items())


async def test_replicas_that_start_together_hold_different_leases(leases):
    names = [f"replica-{number}" for number in range(5)]
    for _ in range(3):
        held = await asyncio.gather(*[leases.keep(name, 10) for name in names])
    taken = [lease for share in held for lease in share]
    assert sorted(taken) == sorted(LEASES)


async def test_leases_of_a_stopped_replica_are_taken_over_immediately(leases):
    await leases.keep("one", 100)
    await leases.release("one")
    assert (await leases.keep("two", 100)).keys() == set(LEASES)


async def test_writes_with_a_lost_lease_are_rejected(database, leases):
    jobs, job = JobStore(database), make_job()
    await jobs.add(job)
    old = (await leases.keep("one", 0.2))[SCHEDULER]
    step = Transition(state=JobState.SUBMITTED, reason="goes to Ray")
    await asyncio.sleep(0.3)
    new = (await leases.keep("two", 0.25))[SCHEDULER]
    assert new.token > old.token
    assert await jobs.advance(job, step, "one", old) is None
    assert await jobs.update_fields(job, old, mlflow_run_id="x") is None
    await jobs.set_queue_reasons({job.id: "an old thought"}, old)
    assert await jobs.get(job.id) == job
    assert (await jobs.advance(job, step, "two", new)).state == JobState.SUBMITTED
