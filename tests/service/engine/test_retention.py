import asyncio
import shutil
import time
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, func, select, update

from service.adapters.run_storage import RunFiles
from service.domain.access import Caller, Scope
from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.jobs import JobState, Transition
from service.domain.webhooks import Webhook
from service.engine.retention import Retention
from service.store.credentials import CredentialStore
from service.store.database import Database
from service.store.idempotency import IdempotencyStore
from service.store.job_inserts import insert_jobs
from service.store.retention import RetentionStore
from service.store.tables import comparisons, deliveries, events, job_tags, jobs
from service.store.webhooks import WebhookStore
from tests.service.examples import make_comparison, make_job


@pytest.fixture
def retention(house, database):
    return Retention(
        house.replica,
        RetentionStore(database),
        WebhookStore(database),
        IdempotencyStore(database),
        CredentialStore(database),
        house.files,
        timedelta(days=30),
    )


async def end(house, database, job, days):
    """Let a job have ended so many days ago."""
    (house.files.job_folder(job.id) / "attempt-1").mkdir(parents=True)
    await house.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")
    await house.round()
    await end_at(database, job, days)


async def end_at(database, job, days):
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


async def test_what_a_job_goes_on_from_stays_as_long_as_that_job(house, database, retention):
    house.policy = house.policy.__class__(most_active=0)
    first = await house.add()
    await end(house, database, first, 60)
    second = await house.add(resumed_from=first.id)
    await end(house, database, second, 50)
    third = await house.add(resumed_from=second.id)  # its checkpoints may be those of the first
    assert await retention.round() == 0
    await end(house, database, third, 1)
    assert await retention.round() == 0
    assert house.files.job_folder(first.id).exists()
    await end_at(database, third, 31)
    assert await retention.round() == 3


async def test_a_comparison_stays_whole_while_something_is_resumed_from_one_of_its_jobs(house, database, retention):
    house.policy = house.policy.__class__(most_active=0)
    comparison = make_comparison()
    one, other = [make_job(comparison_id=comparison.id) for _ in range(2)]
    await house.comparisons.add(comparison, [one, other])
    for job in (one, other):
        await end(house, database, job, 31)
    await house.add(resumed_from=one.id)
    assert await retention.round() == 0


async def test_a_job_that_is_being_resumed_from_is_not_deleted_and_a_deleted_one_not_resumed_from(database, house):
    store, old = RetentionStore(database), await house.add()
    house.policy = house.policy.__class__(most_active=0)
    await end(house, database, old, 31)
    deleting = []

    async def delete():
        deleting.append(await store.forget_jobs(datetime.now(UTC), 10))

    async with database.transaction():
        await house.jobs.add(make_job(resumed_from=old.id))
        task = asyncio.create_task(delete())
        await asyncio.sleep(0.2)  # both databases give it time to look, and neither to see what is not committed
    await task
    assert deleting == [0]
    assert await is_there(house, old)
    other = await house.add()
    await end(house, database, other, 31)
    await delete()
    assert deleting == [0, 1]
    with pytest.raises(NotFound, match=other.id):
        await house.jobs.add(make_job(resumed_from=other.id))


async def test_a_folder_that_cannot_be_deleted_keeps_no_other_and_is_found_again(
    house, database, retention, monkeypatch
):
    house.policy = house.policy.__class__(most_active=0)
    old, other = await house.add(), await house.add()
    await end(house, database, old, 40)
    await end(house, database, other, 31)
    remove = shutil.rmtree

    def fail(path):
        if path == house.files.job_folder(old.id):
            raise OSError("read-only")
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr("service.engine.retention.shutil.rmtree", fail)
        assert await retention.round() == 2
    assert house.files.job_folder(old.id).exists()
    assert not house.files.job_folder(other.id).exists()
    assert await retention.round() == 0
    assert not house.files.job_folder(old.id).exists()
    assert await RetentionStore(database).folders_left() == []


async def test_messages_are_deleted_after_their_end_also_where_jobs_are_kept(house, database):
    house.policy = house.policy.__class__(most_active=0)
    webhooks = WebhookStore(database)
    ends = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
    hook = Webhook(
        id="webhook-1", owner="admin", url="https://a", secret="s", states=ends, created_at=datetime.now(UTC)
    )  # fmt: skip
    await webhooks.add(hook, Caller("admin", (Scope.ADMIN,), "token-1"))
    old, unsent, young = [await house.add() for _ in range(3)]
    for job, days in ((old, 40), (unsent, 40), (young, 20)):
        await end(house, database, job, days)
        if job != unsent:
            async with database.write() as connection:
                ended_at = datetime.now(UTC) - timedelta(days=days)
                query = update(deliveries).where(deliveries.c.job_id == job.id).values(ended_at=ended_at)
                await connection.execute(query)
    keys = IdempotencyStore(database)
    await Retention(
        house.replica, RetentionStore(database), webhooks, keys, CredentialStore(database), house.files, None
    ).round()
    found, _ = await webhooks.deliveries_of(hook.id, 10, None)
    assert [message.job_id for message in found] == [young.id, unsent.id]
    assert await is_there(house, old)


async def test_thousands_are_deleted_in_time(database, house):
    house.policy = house.policy.__class__(most_active=0)
    long_ago = datetime.now(UTC) - timedelta(days=40)
    many = [
        make_job(state=JobState.SUCCEEDED, ended_at=long_ago, created_at=long_ago, mlflow_closed=True)
        for _ in range(4_000)
    ]
    async with database.write() as connection:
        await insert_jobs(connection, many)
    store, began = RetentionStore(database), time.monotonic()
    for _ in range(4):
        assert await store.forget_jobs(datetime.now(UTC), 50) == 50
    assert time.monotonic() - began < 15  # without an index on what a job is resumed from it takes minutes


async def test_sqlite_finds_the_oldest_by_indexes_alone(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 5)
    await database.migrate()
    plans = []

    def explain(connection, _, statement, parameters, *__):
        if statement.startswith("SELECT jobs.id"):
            plans.append(
                "\n".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters))
            )

    event.listen(database._engine.sync_engine, "before_cursor_execute", explain)
    await RetentionStore(database).forget_jobs(datetime.now(UTC), 50)
    await database.close()
    assert "ix_jobs_ended_at" in plans[0]
    assert "ix_jobs_resumed_from" in plans[0]
    assert "TEMP B-TREE" not in plans[0]  # which all old jobs would be put into, for each few that are deleted
    assert "SCAN" not in plans[0]


async def test_only_where_the_schedulers_lease_is_held(house, database, retention):
    house.policy = house.policy.__class__(most_active=0)
    await end(house, database, await house.add(), 31)
    await house.replica._leases.release(house.name)
    await house.replica.renew()
    house.replica._held = {}
    assert await retention.round() == 0


async def test_while_the_storage_is_away_no_folder_is_taken_for_deleted(house, database, retention, tmp_path):
    house.policy = house.policy.__class__(most_active=0)
    storage, elsewhere = tmp_path / "storage", tmp_path / "elsewhere"
    house.files = retention._files = RunFiles(storage)
    house.files.check()
    old = await house.add()
    await end(house, database, old, 31)
    storage.rename(elsewhere)
    storage.mkdir()  # as a mount point is without its mount
    with pytest.raises(UpstreamUnavailable):
        await retention.round()
    storage.rmdir()
    elsewhere.rename(storage)
    await retention.round()
    assert not house.files.job_folder(old.id).exists()
