"""What is particular to SQLite: turns of writers, and transactions that are cancelled at any time."""

import asyncio

import pytest
from sqlalchemy import func, insert, select

from service.store.database import Database
from service.store.tables import job_tags, jobs
from tests.service.examples import make_job


@pytest.fixture
async def sqlite(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 1)
    await database.migrate()
    yield database
    await database.close()


async def count(database, table):
    async with database.read() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


async def test_writers_that_are_cancelled_at_any_time_leave_no_transaction_behind(sqlite):
    from service.store.jobs import JobStore

    store, added = JobStore(sqlite), 0
    for number in range(60):
        task = asyncio.create_task(store.add(make_job(tags=("a", "b"))))
        for _ in range(number):  # of the event loop's rounds, so that each of them is met
            await asyncio.sleep(0)
        task.cancel()
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
        added += ended is None
        await store.add(make_job())  # waits for ever, or a second, if the one before holds the database
        added += 1
    assert await count(sqlite, jobs) >= added
    assert await count(sqlite, job_tags) % 2 == 0


async def test_many_writers_and_readers_get_their_turns(sqlite):
    from service.store.jobs import JobStore

    store = JobStore(sqlite)

    async def work():
        job = make_job()
        await store.add(job)
        return await store.get(job.id) == job

    assert all(await asyncio.gather(*[work() for _ in range(100)]))


async def test_an_error_in_a_write_rolls_all_of_it_back(sqlite):
    async def fail():
        async with sqlite.write() as connection:
            await connection.execute(insert(job_tags).values(tag="a", job_sequence=1, job_id="job-0"))

    with pytest.raises(Exception, match=r"(?i)foreign key"):
        await fail()
    assert await count(sqlite, job_tags) == 0
