import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import NotFound, RequestInProgress
from service.store.idempotency import IdempotencyStore, StoredAnswer
from service.store.jobs import JobStore
from tests.service.examples import make_job, summary_of

OTHER = StoredAnswer("other", 200, {}, b"")
ANSWER = StoredAnswer("request", 202, {"location": "/v1/jobs/x"}, b"\x00 body")


@pytest.fixture
def keys(database):
    return IdempotencyStore(database)


async def test_a_key_is_stored_atomically_with_its_request(database, keys):
    jobs, job, calls = JobStore(database), make_job(), []

    async def fail():
        async with database.transaction():
            await jobs.add(job)
            assert await jobs.get(job.id) == job
            await keys.store("ann", "k", ANSWER)
            database.after_commit(lambda: calls.append("early"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    with pytest.raises(NotFound):
        await jobs.get(job.id)
    assert await keys.find("ann", "k") is None
    async with database.transaction():
        await keys.take("ann", "k")
        await jobs.add(job)
        await keys.store("ann", "k", ANSWER)
        database.after_commit(lambda: calls.append("late"))
        assert calls == []
    assert calls == ["late"]
    assert await jobs.get(job.id) == job
    assert await keys.find("ann", "k") == ANSWER
    with pytest.raises(RequestInProgress):
        await keys.store("ann", "k", OTHER)
    assert await keys.find("ann", "k") == ANSWER
    await keys.store("bob", "k", OTHER)
    assert await keys.find("bob", "k") == OTHER


async def test_a_failed_write_rolls_back_the_enclosing_transaction(database):
    jobs, job = JobStore(database), make_job()

    async def add_twice():
        async with database.transaction():
            await jobs.add(job)
            await jobs.add(job)

    with pytest.raises(Exception, match=r"(?i)unique"):
        await add_twice()
    assert (await jobs.page(10, None))[0] == []


async def test_other_errors_pass_unchanged(database):
    async def fail():
        async with database.transaction():
            raise FileNotFoundError("a file")

    with pytest.raises(FileNotFoundError):
        await fail()


async def test_other_tasks_are_not_part_of_the_transaction(database):
    jobs, job = JobStore(database), make_job()

    async def look():
        return (await jobs.page(10, None))[0]

    async with database.transaction():
        await jobs.add(job)
        assert await look() == [summary_of(job)]
        assert await asyncio.create_task(look()) == []
    assert await look() == [summary_of(job)]


async def take_during(database, keys, first):
    """Insert the key while the transaction of another replica, `first`, holds it.

    Returns whether it succeeded, and after how long.
    """
    taken = asyncio.Event()

    async def hold():
        async with database.transaction():
            await keys.take("ann", "k")
            await keys.find("ann", "k")
            taken.set()
            await asyncio.sleep(0.3)
            await first()

    async def take():
        await taken.wait()
        began = time.monotonic()
        try:
            async with database.transaction():
                await keys.take("ann", "k")
                await keys.store("ann", "k", OTHER)
                return True, time.monotonic() - began
        except RequestInProgress:
            return False, time.monotonic() - began

    _, found = await asyncio.gather(hold(), take(), return_exceptions=True)
    return found


async def test_a_key_in_flight_is_rejected_or_on_sqlite_waited_for(database, keys):
    is_stored, seconds = await take_during(database, keys, lambda: keys.store("ann", "k", ANSWER))
    is_postgresql = database._engine.dialect.name == "postgresql"
    assert not is_stored
    assert (seconds < 0.2) == is_postgresql
    assert await keys.find("ann", "k") == ANSWER


async def test_a_key_is_free_if_the_first_replica_fails(database, keys):
    async def fail():
        raise ZeroDivisionError

    is_stored, _ = await take_during(database, keys, fail)
    if not is_stored:  # on SQLite it has waited and has the key
        await keys.store("ann", "k", OTHER)
    assert is_stored == (database._engine.dialect.name == "sqlite")
    assert await keys.find("ann", "k") == OTHER


async def test_another_key_is_not_blocked(database, keys):
    async with database.transaction():
        await keys.take("ann", "k")
        await keys.take("ann", "l")


async def test_old_keys_are_deleted(database, keys):
    await keys.store("ann", "k", ANSWER)
    now = datetime.now(UTC)
    assert await keys.delete_before(now - timedelta(hours=1)) == 0
    assert await keys.delete_before(now + timedelta(hours=1)) == 1
    await keys.store("ann", "k", OTHER)
