"""Fixtures of the service's tests."""

import shutil

import pytest

from service.store.database import Database
from service.store.webhooks import WebhookStore
from tests.service.client.bad_network import BadNetwork
from tests.service.databases import copy_template, make_template, migrate, postgresql_server, run_apart
from tests.service.engine.replica_fixture import ReplicaFixture
from tests.service.running_api import RunningApi


@pytest.fixture(scope="session")
def postgresql_url():
    with postgresql_server() as url:
        make_template(url)
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    """A SQLite file with all tables."""
    path = tmp_path_factory.mktemp("template") / "test.db"
    run_apart(migrate(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request, tmp_path):
    """An empty database with all tables, of both kinds."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "test.db")
        database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 10)
    else:
        database = Database(await copy_template(request.getfixturevalue("postgresql_url")), 10)
    yield database
    await database.close()


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """One API for all tests of a file."""
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


@pytest.fixture
def replica(database, tmp_path):
    return ReplicaFixture(database, tmp_path)


@pytest.fixture
def webhooks(database):
    return WebhookStore(database)
