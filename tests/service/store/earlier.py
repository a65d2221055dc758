"""Databases of earlier versions, and rows in their tables."""

from contextlib import asynccontextmanager

from alembic import command
from alembic.config import Config
from sqlalchemy import MetaData, Table, insert, inspect, text

from service.store.database import MIGRATIONS


@asynccontextmanager
async def empty_at(database, revision):
    """A transaction in an empty database of an earlier revision."""

    def go_to(connection, revision):
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        command.upgrade(config, revision)

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
