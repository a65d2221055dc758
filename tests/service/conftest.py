"""Fixtures of the control plane's tests."""

import pytest

from service.store.database import Database
from tests.service.client.bad_network import BadNetwork
from tests.service.databases import empty, postgresql_server
from tests.service.running_api import RunningApi


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
        url = request.getfixturevalue("postgresql_url")
        await empty(url)
        database = Database(url, 10)
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """One for all tests of a file."""
    api = RunningApi(tmp_path_factory.mktemp("api"))
    api.start()
    yield api
    api.stop()


@pytest.fixture
def url(api):
    return api.url


@pytest.fixture
def network(api):
    with BadNetwork(api.url).run() as network:
        yield network
