"""Fixtures of the control plane's tests."""

import pytest
from sqlalchemy import text

from service.store.database import Database
from tests.service.databases import postgresql_server


@pytest.fixture(scope="session")
def postgresql_url():
    with postgresql_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request, tmp_path):
    """An empty database with all tables, on both kinds."""
    if request.param == "sqlite":
        database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    else:
        database = Database(request.getfixturevalue("postgresql_url"), 10)
        async with database.write() as connection:
            await connection.execute(text("DROP SCHEMA public CASCADE"))
            await connection.execute(text("CREATE SCHEMA public"))
    await database.migrate()
    yield database
    await database.close()
