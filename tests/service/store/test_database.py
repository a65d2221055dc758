import asyncio
from datetime import UTC, datetime
from importlib import import_module

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text
from sqlalchemy.exc import DBAPIError

from service.domain.errors import StorageFull, UpstreamUnavailable
from service.store.database import MIGRATIONS, Database
from service.store.jobs import JobStore
from service.store.tables import audit, metadata
from service.store.usage import Usage
from tests.service.examples import make_job


async def test_the_migrations_make_the_tables(database):
    async with database.read() as connection:
        difference = await connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), metadata))
    assert difference == []


async def test_migrating_again_changes_nothing(database):
    await database.migrate()
    await database.check()


async def test_what_was_used_before_it_was_kept_apart_is_taken_over(database):
    before = import_module("service.store.migrations.versions.0007_usage").down_revision
    jobs = JobStore(database)
    job = make_job()
    await jobs.add(job)
    async with database.write() as connection:
        await connection.execute(text("UPDATE jobs SET ran_seconds = 2.5, most_gpus = 2, most_cpus = 4"))
        for change in (
            "DROP TABLE usage",
            "DROP TABLE credentials",
            "ALTER TABLE jobs DROP COLUMN stored_bytes",
            "ALTER TABLE jobs DROP COLUMN queue_until",
        ):
            await connection.execute(text(change))  # what this migration and later ones make
        await connection.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": before})
    await database.migrate()
    assert (await jobs.totals()).usage == {job.owner: Usage(gpu_seconds=5, cpu_seconds=10)}


async def test_sqlite_has_a_write_ahead_log_and_makes_its_folder(tmp_path):
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


async def test_who_is_going_to_write_to_sqlite_keeps_other_writers_waiting_from_the_first_read_on(tmp_path):
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
async def test_what_the_server_says_of_itself_is_unavailable_and_our_mistakes_are_not(tmp_path, state, is_troubled):
    class ServerError(Exception):
        sqlstate = state

    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 1)
    with pytest.raises(UpstreamUnavailable if is_troubled else DBAPIError):
        async with database.write():
            raise DBAPIError("SELECT 1", {}, ServerError())
    await database.close()


async def test_a_database_without_space_says_so(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    await database.migrate()

    async def fill():
        async with database.write() as connection:
            await connection.exec_driver_sql("PRAGMA max_page_count=1")  # as few as there are
            await connection.exec_driver_sql("CREATE TABLE large AS SELECT randomblob(1000000) AS content")

    with pytest.raises(StorageFull, match="no space left"):
        await fill()
    await database.check()
    await database.close()


async def test_a_database_that_is_not_there_is_unavailable():
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/none", 1)
    with pytest.raises(UpstreamUnavailable, match="did not answer"):
        await database.check()
    await database.close()


async def test_addresses_of_webhooks_are_cut_down_to_their_hosts_where_they_were_kept_in_the_audit(database):
    def go_to(connection, revision):
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        command.upgrade(config, revision)

    async with database.write() as connection:
        for table in await connection.run_sync(lambda c: inspect(c).get_table_names()):
            await connection.execute(text(f"DROP TABLE {table}" + " CASCADE" * (connection.dialect.name != "sqlite")))
        await connection.run_sync(go_to, "0004")
        for action, detail in (("webhook.create", "to https://a.example:1/secret?x"), ("token.create", "of ann")):
            row = {"at": datetime.now(UTC), "actor": "ann", "action": action, "subject": "x", "detail": detail}
            await connection.execute(insert(audit).values(**row))
    await database.migrate()
    async with database.read() as connection:
        kept = (await connection.execute(select(audit.c.detail).order_by(audit.c.sequence))).scalars().all()
    assert kept == ["to https://a.example", "of ann"]


async def test_connections_that_the_server_has_closed_are_replaced_without_an_error(postgresql_url):
    database, other = Database(postgresql_url, 10), Database(postgresql_url, 10)
    async with database.write() as first, database.read() as second:
        process_ids = [
            (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one() for connection in (first, second)
        ]
        drivers = [(await connection.get_raw_connection()).driver_connection for connection in (first, second)]
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
