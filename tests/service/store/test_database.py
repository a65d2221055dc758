import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from service.store.database import check, migrate, open_database
from service.store.tables import metadata


async def test_the_migrations_make_the_tables(engine):
    async with engine.connect() as connection:
        difference = await connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), metadata))
    # The one thing that Alembic cannot tell apart is how a unique column was declared.
    assert [change for change in difference if change[0] not in ("add_constraint", "remove_constraint")] == []


async def test_migrating_again_changes_nothing(engine):
    await migrate(engine)
    await check(engine)


async def test_sqlite_has_a_write_ahead_log_and_makes_its_folder(tmp_path):
    engine = open_database(f"sqlite+aiosqlite:///{tmp_path}/new/test.db", 1)
    async with engine.connect() as connection:
        assert (await connection.execute(text("PRAGMA journal_mode"))).scalar() == "wal"
    await engine.dispose()


async def test_a_database_that_is_not_there_is_an_error(tmp_path):
    engine = open_database("postgresql+asyncpg://nobody@127.0.0.1:1/none", 1)
    with pytest.raises(OSError, match="1"):
        await check(engine)
    await engine.dispose()
