import asyncio
import sqlite3
import threading
import time
from datetime import UTC, datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError

from service.domain.errors import StorageFull, UpstreamUnavailable
from service.domain.resources import Resources
from service.store.comparisons import ComparisonStore
from service.store.database import Database
from service.store.job_rows import job_row
from service.store.jobs import JobStore
from service.store.tables import audit, job_tags, jobs, metadata
from service.store.usage import Usage
from tests.service.examples import make_job
from tests.service.store.earlier import empty_at, insert_row
from trainer.jobspec import JobSpec, StepSchedule


async def test_the_migrations_create_the_tables(database):
    async with database.read() as connection:
        difference = await connection.run_sync(
            lambda c: compare_metadata(MigrationContext.configure(c), metadata)
        )
    assert difference == []


async def test_migrating_again_changes_nothing(database):
    await database.migrate()
    await database.check()


async def test_sqlite_uses_a_write_ahead_log_and_creates_its_folder(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/new/test.db", 1)
    async with database.read() as connection:
        assert (await connection.execute(text("PRAGMA journal_mode"))).scalar() == "wal"
    await database.close()


async def test_a_locked_database_is_unavailable_in_time(tmp_path):
    first, second = [Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 0.2) for _ in range(2)]
    async with first.write() as connection:
        await connection.execute(text("CREATE TABLE t (x INTEGER)"))
        with pytest.raises(UpstreamUnavailable, match="locked"):
            await second.migrate()
    await first.close()
    await second.close()


async def test_a_sqlite_write_transaction_locks_from_its_first_read(tmp_path):
    first, second = [Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 0.2) for _ in range(2)]
    query = text("SELECT 1")
    async with first.write() as connection:
        await connection.execute(query)
        async with second.read() as reader:
            await reader.execute(query)
        with pytest.raises(UpstreamUnavailable, match="locked"):
            async with second.write() as writer:
                await writer.execute(query)
    await first.close()
    await second.close()


@pytest.mark.parametrize(
    ("state", "is_troubled"), [("57P03", True), ("53300", True), ("40P01", True), ("23505", False)]
)
async def test_only_errors_of_the_database_server_are_unavailable(tmp_path, state, is_troubled):
    class ServerError(Exception):
        sqlstate = state

    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 1)
    with pytest.raises(UpstreamUnavailable if is_troubled else DBAPIError):
        async with database.write():
            raise DBAPIError("SELECT 1", {}, ServerError())
    await database.close()


async def test_a_full_database_is_reported(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    await database.migrate()

    async def fill():
        async with database.write() as connection:
            await connection.exec_driver_sql("PRAGMA max_page_count=1")  # the minimum
            await connection.exec_driver_sql("CREATE TABLE large AS SELECT randomblob(1000000) AS content")

    with pytest.raises(StorageFull, match="no space left"):
        await fill()
    await database.check()
    await database.close()


async def test_a_cancelled_statement_has_ended_when_the_database_is_closed(tmp_path):
    """Its thread answers to the event loop, which a test or a service closes next."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000000) "

    async def count():
        async with database.read() as connection:
            await connection.execute(text(numbers + "SELECT COUNT(*) FROM n"))

    reading = asyncio.create_task(count())
    await asyncio.sleep(0.1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await database.close()
    assert not any(thread.is_alive() for thread in database._threads)


async def test_a_cancelled_opening_has_ended_when_the_database_is_closed(tmp_path, monkeypatch):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    connect = sqlite3.connect

    def connect_slowly(*arguments, **options):
        time.sleep(0.5)
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", connect_slowly)
    before = set(threading.enumerate())
    checking = asyncio.create_task(database.check())
    await asyncio.sleep(0.1)
    opening = [thread for thread in set(threading.enumerate()) - before if "connection" in thread.name]
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    await database.close()
    assert opening
    assert not any(thread.is_alive() for thread in opening)


async def test_an_unreachable_database_is_unavailable():
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/none", 1)
    with pytest.raises(UpstreamUnavailable, match="did not answer"):
        await database.check()
    await database.close()


async def insert_event(connection, job):
    """Insert a row with a foreign key to a job, with which SQLite does not drop its table."""
    event = {"job_id": job.id, "state": "queued", "reason": "x", "attempt": 1, "actor": "admin"}
    await insert_row(connection, "events", event | {"at": datetime.now(UTC)})


async def test_the_migration_sums_usage_of_earlier_jobs(database):
    job = make_job()
    async with empty_at(database, "0006") as connection:
        await insert_row(
            connection, "jobs", job_row(job) | {"ran_seconds": 2.5, "max_gpus": 2, "max_cpus": 4}
        )
    await database.migrate()
    assert (await JobStore(database).totals()).usage == {job.owner: Usage(gpu_seconds=5, cpu_seconds=10)}


OLD_SPEC = {
    "steps": 9,
    "accumulate": 2,
    "clip_norm": 0.5,
    "deadline_seconds": 60.0,
    "schedule": {"name": "step", "steps": [3], "factor": 0.5},
    "sharding": "by_label",
    "num_workers": 2,
}


async def test_specs_with_earlier_field_names_are_migrated(database):
    job = make_job(comparison_id="comparison-1")
    now = datetime.now(UTC)
    stored = job_row(job) | {
        "spec": OLD_SPEC,
        "variant": {"schedule.steps": [3], "norm": "sync"},
        "queue_seconds": 5.0,
        "run_seconds": 7.0,
    }
    comparison = {
        "id": "comparison-1",
        "name": "old",
        "owner": job.owner,
        "matrix": {"sharding": ["iid", "by_label"], "optimizer.lr": [0.1]},
        "baseline": {"sharding": "iid", "optimizer.lr": 0.1},
        "metric": "accuracy",
        "created_at": now,
        "mlflow_closed": False,
    }
    async with empty_at(database, "0010") as connection:
        await insert_row(connection, "comparisons", comparison)
        await insert_row(connection, "jobs", stored)
        await insert_event(connection, job)
    await database.migrate()
    read = await JobStore(database).get(job.id)
    assert read.spec == JobSpec(
        steps=9,
        num_workers=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        max_train_seconds=60.0,
        lr_schedule=StepSchedule(name="step", steps=[3], factor=0.5),
        data_partition="by_label",
    )
    assert (read.queue_timeout_seconds, read.max_run_seconds) == (5.0, 7.0)
    assert read.variant == {"lr_schedule.steps": [3], "norm": "sync"}
    found = await ComparisonStore(database).get("comparison-1")
    assert found.matrix == {"data_partition": ["iid", "by_label"], "optimizer.lr": [0.1]}
    assert found.baseline == {"data_partition": "iid", "optimizer.lr": 0.1}


async def test_rules_and_resources_with_earlier_names_are_migrated(database):
    job = make_job(comparison_id="comparison-1")
    old = {"says": "best", "measure": {"take": "most", "metric": "accuracy"}, "of": {"norm": "sync"}}
    comparison = {
        "id": "comparison-1",
        "name": "old",
        "owner": job.owner,
        "matrix": {"norm": ["none", "sync"]},
        "baseline": {"norm": "none"},
        "metric": "accuracy",
        "recipe": {"claim": "c", "verdict": [old | {"relation": "above", "bound": 0.5}], "figures": [old]},
        "created_at": datetime.now(UTC),
        "mlflow_closed": False,
    }
    resources = {"min_cpus": 2.0, "min_gpus": 0.0, "max_cpus": 3.0, "max_gpus": 1.0}
    async with empty_at(database, "0012") as connection:
        await insert_row(connection, "comparisons", comparison)
        await insert_row(connection, "jobs", job_row(job) | resources)
        await insert_event(connection, job)
    await database.migrate()
    recipe = (await ComparisonStore(database).get("comparison-1")).recipe
    assert [(each["label"], each["measure"]["take"]) for each in recipe["verdict"] + recipe["figures"]] == [
        ("best", "max"),
        ("best", "max"),
    ]
    (queued,) = (await JobStore(database).queue()).waiting.values()
    assert (queued.min_resources, queued.max_resources) == (Resources(2, 0), Resources(3, 1))


async def test_the_migration_reduces_webhook_urls_in_the_audit_to_hosts(database):
    async with empty_at(database, "0004") as connection:
        for action, detail in (
            ("webhook.create", "to https://a.example:1/secret?x"),
            ("token.create", "of ann"),
        ):
            row = {
                "at": datetime.now(UTC),
                "actor": "ann",
                "action": action,
                "subject": "x",
                "detail": detail,
            }
            await connection.execute(insert(audit).values(**row))
    await database.migrate()
    async with database.read() as connection:
        kept = (await connection.execute(select(audit.c.detail).order_by(audit.c.sequence))).scalars().all()
    assert kept == ["to https://a.example", "of ann"]


async def test_connections_closed_by_the_server_are_replaced(postgresql_url):
    database, other = Database(postgresql_url, 10), Database(postgresql_url, 10)
    async with database.write() as first, database.read() as second:
        process_ids = [
            (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            for connection in (first, second)
        ]
        drivers = [
            (await connection.get_raw_connection()).driver_connection for connection in (first, second)
        ]
    async with other.read() as connection:
        for process_id in process_ids:
            await connection.execute(text("SELECT pg_terminate_backend(:id, 5000)"), {"id": process_id})
    async with asyncio.timeout(5):
        while not all(driver.is_closed() for driver in drivers):
            await asyncio.sleep(0.01)
    await database.check()
    async with database.write() as connection:
        assert (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one() not in process_ids
    await database.close()
    await other.close()


async def test_reads_begin_no_transaction_and_writes_do(postgresql_url):
    database = Database(postgresql_url, 10)
    for lend, transactions in [(database.read, 2), (database.write, 1), (database.read, 2)]:
        async with lend() as connection:
            query = text("SELECT cast(pg_current_xact_id() AS text)")
            assert len({(await connection.execute(query)).scalar_one() for _ in range(2)}) == transactions
    await database.close()


@pytest.fixture
async def sqlite(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    await database.migrate()
    yield database
    await database.close()


async def count(database, table):
    async with database.read() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


async def test_cancelled_writers_leave_no_open_transaction(sqlite):
    from service.store.jobs import JobStore

    store, added = JobStore(sqlite), 0
    for number in range(60):
        task = asyncio.create_task(store.add(make_job(tags=("a", "b"))))
        for _ in range(number):  # iterations of the event loop, so that each of them is covered
            await asyncio.sleep(0)
        task.cancel()
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
        added += ended is None
        await store.add(make_job())  # waits if the writer before still holds the database
        added += 1
    assert await count(sqlite, jobs) >= added
    assert await count(sqlite, job_tags) % 2 == 0


async def test_concurrent_writers_and_readers_all_complete(sqlite):
    from service.store.jobs import JobStore

    store = JobStore(sqlite)

    async def work():
        job = make_job()
        await store.add(job)
        return await store.get(job.id) == job

    assert all(await asyncio.gather(*[work() for _ in range(100)]))


async def test_an_error_rolls_back_the_whole_write(sqlite):
    async def fail():
        async with sqlite.write() as connection:
            await connection.execute(insert(job_tags).values(tag="a", job_sequence=1, job_id="job-0"))

    with pytest.raises(Exception, match=r"(?i)foreign key"):
        await fail()
    assert await count(sqlite, job_tags) == 0
