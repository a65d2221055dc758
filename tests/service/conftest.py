"""Fixtures of the control plane's tests."""

import pytest
from sqlalchemy import text

from service.store.database import migrate, open_database
from tests.service.databases import postgresql_server


@pytest.fixture(scope="session")
def postgresql_url():
    with postgresql_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
async def engine(request, tmp_path):
    """An empty database with all tables, on both kinds."""
    if request.param == "sqlite":
        engine = open_database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    else:
        engine = open_database(request.getfixturevalue("postgresql_url"), 10)
        async with engine.begin() as connection:
            await connection.execute(text("DROP SCHEMA public CASCADE"))
            await connection.execute(text("CREATE SCHEMA public"))
    await migrate(engine)
    yield engine
    await engine.dispose()
