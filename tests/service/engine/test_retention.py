import asyncio
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update

from service.adapters.run_storage import RunFiles
from service.domain.access import Caller, Scope
from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.jobs import JobState, Transition
from service.domain.webhooks import Webhook
from service.engine.retention import Retention
from service.store.credentials import CredentialStore
from service.store.idempotency import IdempotencyStore
from service.store.retention import RetentionStore
from service.store.tables import comparisons, deliveries, events, job_tags, jobs
from service.store.webhooks import WebhookStore
from tests.service.examples import make_comparison, make_job


@pytest.fixture
def retention(replica, database):
    return Retention(
        replica.lease_holder,
        RetentionStore(database),
        WebhookStore(database),
        IdempotencyStore(database),
        CredentialStore(database),
        replica.files,
        timedelta(days=30),
    )


async def end(replica, database, job, days):
    """End a job this many days ago."""
    (replica.files.job_folder(job.id) / "attempt-1").mkdir(parents=True)
    await replica.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")
    await replica.tick()
    await end_at(database, job, days)


async def end_at(database, job, days):
    async with database.write() as connection:
        at = datetime.now(UTC) - timedelta(days=days)
        await connection.execute(update(jobs).where(jobs.c.id == job.id).values(ended_at=at))


async def is_there(replica, job):
    try:
        await replica.jobs.get(job.id)
    except NotFound:
        return False
    return True


async def test_old_jobs_are_deleted_with_dependent_rows_and_files(replica, database, retention):
    replica.policy = replica.policy.__class__(max_active=0)
    old, young, waiting = [await replica.add(tags=("nightly",)) for _ in range(3)]
    await end(replica, database, old, 31)
    await end(replica, database, young, 29)
    assert await retention.delete_old() == 1
    assert [await is_there(replica, job) for job in (old, young, waiting)] == [False, True, True]
    assert not replica.files.job_folder(old.id).exists()
    assert replica.files.job_folder(young.id).exists()
    async with database.read() as connection:
        for table in (events, job_tags):
            rows = select(func.count()).select_from(table).where(table.c.job_id == old.id)
            assert (await connection.execute(rows)).scalar_one() == 0


async def test_a_comparison_is_deleted_as_a_whole(replica, database, retention):
    replica.policy = replica.policy.__class__(max_active=0)
    comparison = make_comparison()
    one, other = [make_job(comparison_id=comparison.id) for _ in range(2)]
    await replica.comparisons.add(comparison, [one, other])
    await end(replica, database, one, 31)
    assert await retention.delete_old() == 0
    await end(replica, database, other, 31)
    assert await retention.delete_old() == 2
    async with database.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(comparisons))).scalar_one() == 0


async def test_the_source_of_a_resumed_job_is_kept_as_long_as_the_job(replica, database, retention):
    replica.policy = replica.policy.__class__(max_active=0)
    first = await replica.add()
    await end(replica, database, first, 60)
    second = await replica.add(resumed_from=first.id)
    await end(replica, database, second, 50)
    third = await replica.add(resumed_from=second.id)  # its checkpoints may be those of the first
    assert await retention.delete_old() == 0
    await end(replica, database, third, 1)
    assert await retention.delete_old() == 0
    assert replica.files.job_folder(first.id).exists()
    await end_at(database, third, 31)
    assert await retention.delete_old() == 3


async def test_a_comparison_is_kept_while_a_job_resumes_from_it(replica, database, retention):
    replica.policy = replica.policy.__class__(max_active=0)
    comparison = make_comparison()
    one, other = [make_job(comparison_id=comparison.id) for _ in range(2)]
    await replica.comparisons.add(comparison, [one, other])
    for job in (one, other):
        await end(replica, database, job, 31)
    await replica.add(resumed_from=one.id)
    assert await retention.delete_old() == 0


async def test_deletion_and_resumption_of_one_job_exclude_each_other(database, replica):
    store, old = RetentionStore(database), await replica.add()
    replica.policy = replica.policy.__class__(max_active=0)
    await end(replica, database, old, 31)
    deleting = []

    async def delete():
        deleting.append(await store.delete_jobs(datetime.now(UTC), 10))

    async with database.transaction():
        await replica.jobs.add(make_job(resumed_from=old.id))
        task = asyncio.create_task(delete())
        await asyncio.sleep(0.2)  # both databases let it read, but not see uncommitted rows
    await task
    assert deleting == [0]
    assert await is_there(replica, old)
    other = await replica.add()
    await end(replica, database, other, 31)
    await delete()
    assert deleting == [0, 1]
    with pytest.raises(NotFound, match=other.id):
        await replica.jobs.add(make_job(resumed_from=other.id))


async def test_a_folder_that_cannot_be_deleted_is_retried_and_blocks_no_other(
    replica, database, retention, monkeypatch
):
    replica.policy = replica.policy.__class__(max_active=0)
    old, other = await replica.add(), await replica.add()
    await end(replica, database, old, 40)
    await end(replica, database, other, 31)
    remove = shutil.rmtree

    def fail(path):
        if path == replica.files.job_folder(old.id):
            raise OSError("read-only")
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr("service.engine.retention.shutil.rmtree", fail)
        assert await retention.delete_old() == 2
    assert replica.files.job_folder(old.id).exists()
    assert not replica.files.job_folder(other.id).exists()
    assert await retention.delete_old() == 0
    assert not replica.files.job_folder(old.id).exists()
    assert await RetentionStore(database).folders_left() == []


async def test_old_messages_are_deleted_even_if_jobs_are_kept(replica, database):
    replica.policy = replica.policy.__class__(max_active=0)
    webhooks = WebhookStore(database)
    ends = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
    hook = Webhook(
        id="webhook-1", owner="admin", url="https://a", secret="s", states=ends, created_at=datetime.now(UTC)
    )  # fmt: skip
    await webhooks.add(hook, Caller("admin", (Scope.ADMIN,), "token-1"))
    old, unsent, young = [await replica.add() for _ in range(3)]
    for job, days in ((old, 40), (unsent, 40), (young, 20)):
        await end(replica, database, job, days)
        if job != unsent:
            async with database.write() as connection:
                ended_at = datetime.now(UTC) - timedelta(days=days)
                query = update(deliveries).where(deliveries.c.job_id == job.id).values(ended_at=ended_at)
                await connection.execute(query)
    keys = IdempotencyStore(database)
    await Retention(
        replica.lease_holder,
        RetentionStore(database),
        webhooks,
        keys,
        CredentialStore(database),
        replica.files,
        None,
    ).delete_old()
    found, _ = await webhooks.deliveries_of(hook.id, 10, None)
    assert [message.job_id for message in found] == [young.id, unsent.id]
    assert await is_there(replica, old)


async def test_retention_needs_the_scheduler_lease(replica, database, retention):
    replica.policy = replica.policy.__class__(max_active=0)
    await end(replica, database, await replica.add(), 31)
    await replica.lease_holder._leases.release(replica.name)
    await replica.lease_holder.renew()
    replica.lease_holder._held = {}
    assert await retention.delete_old() == 0


async def test_folders_are_not_marked_as_deleted_while_storage_is_missing(
    replica, database, retention, tmp_path
):
    replica.policy = replica.policy.__class__(max_active=0)
    storage, elsewhere = tmp_path / "storage", tmp_path / "elsewhere"
    replica.files = retention._files = RunFiles(storage)
    replica.files.check()
    old = await replica.add()
    await end(replica, database, old, 31)
    storage.rename(elsewhere)
    storage.mkdir()  # like a mount point without its mount
    with pytest.raises(UpstreamUnavailable):
        await retention.delete_old()
    storage.rmdir()
    elsewhere.rename(storage)
    await retention.delete_old()
    assert not replica.files.job_folder(old.id).exists()
