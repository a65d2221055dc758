"""The API in this process, on a real database, with stand-ins for Ray and MLflow."""

from contextlib import AsyncExitStack

import httpx
import pytest

from service.api.app import make_app
from service.settings import Settings
from tests.fakes import FakeMlflow, FakeRay
from tests.service.databases import empty

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
    """An empty database: SQLite's, or PostgreSQL's for the files that are parametrised by ON_BOTH_DATABASES."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/test.db"
    url = request.getfixturevalue("postgresql_url")
    await empty(url)
    return url


@pytest.fixture
async def app(tmp_path, ray, mlflow, database_url):
    settings = Settings(
        token=TOKEN,
        grace_seconds=0,
        public_url="http://syncbn.example/",
        database_url=database_url,
        storage=tmp_path / "storage",
        secrets_folder=tmp_path / "secrets",
        poll_seconds=0.02,
        check_seconds=0,
    )
    app = make_app(settings, ray, mlflow)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def anyone(app):
    """A caller without a token."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.fixture
async def client(anyone):
    anyone.headers["Authorization"] = f"Bearer {TOKEN}"
    return anyone


@pytest.fixture
async def as_owner(app, client):
    """Make a client with a token of its own."""
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
async def anyone_else(app):
    """A caller without a token, beside those with one."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
