from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update

from service.domain.errors import NotFound
from service.domain.jobs import JobState, Transition
from service.engine.retention import Retention
from service.store.idempotency import IdempotencyStore
from service.store.retention import RetentionStore
from service.store.tables import comparisons, events, job_tags, jobs
from tests.service.examples import make_comparison, make_job


@pytest.fixture
def retention(house, database):
    return Retention(
        house.replica, RetentionStore(database), IdempotencyStore(database), house.files, timedelta(days=30)
    )


async def end(house, database, job, days):
    """Let a job have ended so many days ago."""
    (house.files.job_folder(job.id) / "attempt-1").mkdir(parents=True)
    await house.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")
    await house.round()
    async with database.write() as connection:
        at = datetime.now(UTC) - timedelta(days=days)
        await connection.execute(update(jobs).where(jobs.c.id == job.id).values(ended_at=at))


async def is_there(house, job):
    try:
        await house.jobs.get(job.id)
    except NotFound:
        return False
    return True


async def test_old_jobs_are_deleted_with_all_that_hangs_on_them(house, database, retention):
    house.policy = house.policy.__class__(most_active=0)
    old, young, waiting = [await house.add(tags=("nightly",)) for _ in range(3)]
    await end(house, database, old, 31)
    await end(house, database, young, 29)
    assert await retention.round() == 1
    assert [await is_there(house, job) for job in (old, young, waiting)] == [False, True, True]
    assert not house.files.job_folder(old.id).exists()
    assert house.files.job_folder(young.id).exists()
    async with database.read() as connection:
        for table in (events, job_tags):
            rows = select(func.count()).select_from(table).where(table.c.job_id == old.id)
            assert (await connection.execute(rows)).scalar_one() == 0


async def test_a_comparison_goes_as_a_whole(house, database, retention):
    house.policy = house.policy.__class__(most_active=0)
    comparison = make_comparison()
    one, other = [make_job(comparison_id=comparison.id) for _ in range(2)]
    await house.comparisons.add(comparison, [one, other])
    await end(house, database, one, 31)
    assert await retention.round() == 0
    await end(house, database, other, 31)
    assert await retention.round() == 2
    async with database.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(comparisons))).scalar_one() == 0


async def test_what_a_job_goes_on_from_stays_until_it_has_ended(house, database, retention):
    house.policy = house.policy.__class__(most_active=0)
    old = await house.add()
    await end(house, database, old, 40)
    resumed = await house.add(resumed_from=old.id)
    assert await retention.round() == 0
    await end(house, database, resumed, 1)
    assert await retention.round() == 1


async def test_files_that_cannot_be_deleted_keep_the_job(house, database, retention, monkeypatch):
    house.policy = house.policy.__class__(most_active=0)
    old = await house.add()
    await end(house, database, old, 31)
    with monkeypatch.context() as patched:
        patched.setattr(
            "service.engine.retention.shutil.rmtree", lambda path: (_ for _ in ()).throw(OSError("read-only"))
        )
        with pytest.raises(OSError, match="read-only"):
            await retention.round()
    assert await is_there(house, old)
    assert await retention.round() == 1


async def test_only_where_the_schedulers_lease_is_held(house, database, retention):
    house.policy = house.policy.__class__(most_active=0)
    await end(house, database, await house.add(), 31)
    await house.replica._leases.give_back(house.name)
    await house.replica.renew()
    house.replica._held = {}
    assert await retention.round() == 0
