import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import NotFound
from service.store.idempotency import IdempotencyStore, StoredAnswer
from service.store.jobs import JobStore
from tests.service.examples import make_job

ANSWER = StoredAnswer("request", 202, {"location": "/v1/jobs/x"}, b"\x00 body")


@pytest.fixture
def keys(database):
    return IdempotencyStore(database)


async def test_a_key_and_what_its_request_stores_come_together(database, keys):
    jobs, job, calls = JobStore(database), make_job(), []

    async def fail():
        async with database.transaction():
            assert await keys.claim("ann", "k", "request") is None
            await jobs.add(job)
            assert await jobs.get(job.id) == job
            database.after_commit(lambda: calls.append("early"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    with pytest.raises(NotFound):
        await jobs.get(job.id)
    async with database.transaction():
        assert await keys.claim("ann", "k", "request") is None
        await jobs.add(job)
        await keys.store("ann", "k", ANSWER)
        database.after_commit(lambda: calls.append("late"))
        assert calls == []
    assert calls == ["late"]
    assert await jobs.get(job.id) == job
    async with database.transaction():
        assert await keys.claim("ann", "k", "other") == ANSWER
        assert await keys.claim("bob", "k", "other") is None


async def test_a_write_that_fails_inside_a_transaction_ends_all_of_it(database):
    jobs, job = JobStore(database), make_job()

    async def add_twice():
        async with database.transaction():
            await jobs.add(job)
            await jobs.add(job)

    with pytest.raises(Exception, match=r"(?i)unique"):
        await add_twice()
    assert (await jobs.page(10, None))[0] == []


async def test_trouble_that_is_not_the_databases_passes_as_it_is(database):
    async def fail():
        async with database.transaction():
            raise FileNotFoundError("a file")

    with pytest.raises(FileNotFoundError):
        await fail()


async def test_what_another_task_reads_and_writes_is_no_part_of_it(database):
    jobs, job = JobStore(database), make_job()

    async def look():
        return (await jobs.page(10, None))[0]

    async with database.transaction():
        await jobs.add(job)
        assert await look() == [job]
        assert await asyncio.create_task(look()) == []
    assert await look() == [job]


async def test_of_two_replicas_one_waits_for_the_other_and_gets_its_answer(database, keys):
    claimed, order = asyncio.Event(), []

    async def first():
        async with database.transaction():
            assert await keys.claim("ann", "k", "request") is None
            claimed.set()
            await asyncio.sleep(0.2)
            await keys.store("ann", "k", ANSWER)
            order.append("first")

    async def second():
        await claimed.wait()
        async with database.transaction():
            found = await keys.claim("ann", "k", "request")
            order.append("second")
            return found

    _, found = await asyncio.gather(first(), second())
    assert (found, order) == (ANSWER, ["first", "second"])


async def test_if_the_first_replica_fails_the_other_goes_ahead(database, keys):
    claimed = asyncio.Event()

    async def first():
        async with database.transaction():
            await keys.claim("ann", "k", "request")
            claimed.set()
            await asyncio.sleep(0.2)
            raise ZeroDivisionError

    async def second():
        await claimed.wait()
        async with database.transaction():
            return await keys.claim("ann", "k", "request")

    failed, found = await asyncio.gather(first(), second(), return_exceptions=True)
    assert isinstance(failed, ZeroDivisionError)
    assert found is None


async def test_old_keys_are_forgotten(database, keys):
    async with database.transaction():
        await keys.claim("ann", "k", "request")
    now = datetime.now(UTC)
    assert await keys.forget_before(now - timedelta(hours=1)) == 0
    assert await keys.forget_before(now + timedelta(hours=1)) == 1
    async with database.transaction():
        assert await keys.claim("ann", "k", "another") is None
