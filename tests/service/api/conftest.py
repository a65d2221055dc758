"""In-process API on a real database, with fakes of Ray and MLflow."""

import shutil
from contextlib import AsyncExitStack

import httpx
import pytest

from service.api.app import make_app
from service.settings import Settings
from tests.fakes import FakeMlflow, FakeRay
from tests.service.databases import copy_template

TOKEN = "0123456789abcdef-test"
ON_BOTH_DATABASES = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def ray():
    return FakeRay()


@pytest.fixture
def mlflow():
    return FakeMlflow()


@pytest.fixture
async def database_url(request, tmp_path):
    """An empty SQLite database, or a PostgreSQL one for files parametrised by ON_BOTH_DATABASES."""
    if getattr(request, "param", "sqlite") == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "test.db")
        return f"sqlite+aiosqlite:///{tmp_path}/test.db"
    return await copy_template(request.getfixturevalue("postgresql_url"))


@pytest.fixture(scope="session")
def application():
    """Application without components, shared, since the first requests of a new one analyse its routes."""
    return make_app(Settings())


@pytest.fixture
async def app(application, tmp_path, ray, mlflow, database_url):
    """Application with components of the test."""
    application.state.upstreams = ray, mlflow
    application.state.settings = Settings(
        token=TOKEN,
        outcome_grace_seconds=0,
        public_url="http://syncbn.example/",
        database_url=database_url,
        storage=tmp_path / "storage",
        secrets_folder=tmp_path / "secrets",
        poll_seconds=0.02,
        check_seconds=0,
        owner_quotas={"capped": {"priority": 10}},
    )
    async with application.router.lifespan_context(application):
        yield application


@pytest.fixture
async def anonymous(app):
    """Client without a token."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.fixture
async def client(anonymous):
    anonymous.headers["Authorization"] = f"Bearer {TOKEN}"
    return anonymous


@pytest.fixture
async def as_owner(app, client):
    """Create clients with their own tokens."""
    async with AsyncExitStack() as stack:

        async def make(owner, *scopes):
            body = {"owner": owner, "scopes": list(scopes) or ["submit"]}
            token = (await client.post("/v1/tokens", json=body)).json()["token"]
            return await stack.enter_async_context(
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(app),
                    base_url="http://test",
                    headers={"Authorization": f"Bearer {token}"},
                )
            )

        yield make


@pytest.fixture
async def other_anonymous(app):
    """A second client without a token, in addition to those with one."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
