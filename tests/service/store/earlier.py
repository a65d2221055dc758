"""Databases of earlier versions, and rows in their tables."""

import sqlite3
from contextlib import asynccontextmanager, closing
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import MetaData, Table, create_engine, insert, inspect, text

from service.store.database import MIGRATIONS


def go_to(connection, revision):
    """Migrate a database to a revision."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, revision)


def copy_to_revision(path, revision):
    """Replace a SQLite database by one of an earlier revision with the same rows, as far as it has them."""
    earlier = path.with_name("earlier.db")
    engine = create_engine(f"sqlite:///{earlier}")
    with engine.begin() as connection:
        go_to(connection, revision)
        tables = [name for name in inspect(connection).get_table_names() if name != "alembic_version"]
    engine.dispose()
    with closing(sqlite3.connect(earlier)) as connection, connection:
        connection.execute("ATTACH ? AS later", [str(path)])
        for table in tables:
            columns = [
                {row[1] for row in connection.execute(f"PRAGMA {schema}.table_info({table})")}
                for schema in ("main", "later")
            ]
            shared = ", ".join(sorted(columns[0] & columns[1]))
            connection.execute(f"DELETE FROM {table}")
            connection.execute(f"INSERT INTO {table} ({shared}) SELECT {shared} FROM later.{table}")
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    earlier.replace(path)


@asynccontextmanager
async def empty_at(database, revision):
    """A transaction in an empty database of an earlier revision."""

    async with database.write() as connection:
        for table in await connection.run_sync(lambda c: inspect(c).get_table_names()):
            await connection.execute(
                text(f"DROP TABLE {table}" + " CASCADE" * (connection.dialect.name != "sqlite"))
            )
        await connection.run_sync(go_to, revision)
        yield connection


EARLIER = {
    "min_cpus": "least_cpus",
    "min_gpus": "least_gpus",
    "max_cpus": "most_cpus",
    "max_gpus": "most_gpus",
}


async def insert_row(connection, name, row):
    """Insert a row into a table as it is in the database, under the names of its columns there.

    Without such a table, nothing is inserted.
    """
    if not await connection.run_sync(lambda c: inspect(c).has_table(name)):
        return
    table = await connection.run_sync(lambda c: Table(name, MetaData(), autoload_with=c))
    row = {EARLIER[c]: value for c, value in row.items() if c in EARLIER} | row
    await connection.execute(insert(table).values({c: v for c, v in row.items() if c in table.c}))
