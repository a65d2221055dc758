"""In-process API with a real MLflow and a fake of Ray: jobs start and stay running."""

import asyncio

import httpx
import pytest

from service.api.app import make_app
from service.settings import Settings
from tests.fakes import FakeRay

TOKEN = "0123456789abcdef-test"


@pytest.fixture
def ray():
    return FakeRay()


@pytest.fixture
def settings(tmp_path, stack):
    return Settings(
        token=TOKEN,
        public_url="http://test",
        database_url=f"sqlite+aiosqlite:///{tmp_path}/test.db",
        storage=tmp_path / "storage",
        mlflow_url=stack.mlflow[0],
        mlflow_secret=stack.mlflow[1],
        poll_seconds=0.05,
        call_timeout_seconds=60,
        check_seconds=0,
        max_artifact_bytes=4_000_000,
        max_attempt_artifact_bytes=9_000_000,
        rate_per_second=100_000,
        rate_burst=100_000,
    )


@pytest.fixture
async def app(settings, ray):
    app = make_app(settings, ray)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
def connect(app):
    """Create clients of the API, with or without a token."""

    def make(token=None, **options):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://test",
            headers=headers,
            timeout=60,
            **options,
        )

    return make


@pytest.fixture
async def admin(connect):
    async with connect(TOKEN) as client:
        yield client


@pytest.fixture
async def reader(admin, connect):
    body = {"owner": "eve", "scopes": ["read"]}
    async with connect((await admin.post("/v1/tokens", json=body)).json()["token"]) as client:
        yield client


@pytest.fixture
def start_job(admin, ray):
    """Submit a job, wait for its submission, and return the context of its attempt."""

    async def start(name="job"):
        spec = {"steps": 10, "data": {"name": "digits"}, "num_workers": 1}
        job = (await admin.post("/v1/jobs", json={"name": name, "spec": spec})).json()
        async with asyncio.timeout(60):
            while not (handed := ray.tasks.get(f"{job['id']}-a1")):
                await asyncio.sleep(0.05)
        return handed[0].context

    return start
