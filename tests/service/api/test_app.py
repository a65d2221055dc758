import asyncio
import resource
import threading
from contextlib import contextmanager

import httpx
import pytest

from tests.service.api.conftest import TOKEN
from tests.service.api.test_jobs import SPEC


@pytest.fixture
def nothing_is_kept(monkeypatch):
    """Each question about readiness is answered by a new look."""
    monkeypatch.setattr("service.api.health.SECONDS_KEPT", 0.0)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic dGVzdDp0ZXN0", "0123456789abcdef-test", "Bearer ü"]
)
async def test_every_v1_call_needs_the_token(anyone, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path in [
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs/x/logs"),
        ("GET", "/v1/comparisons/x/report"),
    ]:
        answer = await anyone.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"


async def test_every_v1_operation_is_behind_the_token(anyone):
    paths = (await anyone.get("/openapi.json")).json()["paths"]
    open_to_all = {
        path for path, methods in paths.items() for operation in methods.values() if "security" not in operation
    }
    assert open_to_all == {"/livez", "/readyz"}


async def test_docs_are_there(anyone):
    assert "swagger" in (await anyone.get("/docs")).text.lower()


async def test_a_mistake_of_ours_answers_as_a_problem_too(app):
    app.state.components.jobs.page = None
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "NoneType" not in answer.text


async def test_readiness_is_honest(anyone, ray, mlflow, nothing_is_kept):
    assert (await anyone.get("/livez")).status_code == 200
    ready = await anyone.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    ray.is_down = True
    unready = await anyone.get("/readyz")
    assert unready.status_code == 503
    assert unready.json()["ray"] == {"ok": False, "detail": "does not answer; the service's log says more"}
    assert unready.json()["database"]["ok"]
    mlflow.is_down = True
    assert not (await anyone.get("/readyz")).json()["mlflow"]["ok"]


async def test_a_storage_that_is_gone_is_told(anyone, tmp_path, nothing_is_kept):
    assert (await anyone.get("/readyz")).json()["storage"] == {"ok": True, "detail": "answers"}
    (tmp_path / "storage").rename(tmp_path / "unmounted")
    (tmp_path / "storage").mkdir()
    answer = await anyone.get("/readyz")
    assert (answer.status_code, answer.json()["storage"]["ok"]) == (503, False)
    (tmp_path / "storage").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "storage")
    assert (await anyone.get("/readyz")).json()["storage"]["ok"]


@contextmanager
def full_disk():
    """No file of this process can grow, as on a full disk; mounting a small one takes rights that not every machine gives."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_on_a_full_disk_nothing_is_accepted(anyone, client, nothing_is_kept, monkeypatch):
    monkeypatch.setattr("service.adapters.run_storage.SECONDS_BETWEEN_PROBES", 0.0)
    body = {"name": "mine", "spec": SPEC}
    with full_disk():
        answer = await anyone.get("/readyz")
        refused = [
            await client.post("/v1/jobs", json=body),
            await client.post("/v1/comparisons", json=body | {"matrix": {"norm": ["none", "sync"]}}),
        ]
    assert (answer.status_code, answer.json()["storage"]) == (503, {"ok": False, "detail": "no space left on its disk"})
    assert not answer.json()["database"]["ok"]
    for problem in refused:
        assert (problem.status_code, problem.json()["title"]) == (507, "Insufficient Storage")
        assert problem.json()["detail"].startswith("the storage has no space left")
    assert (await anyone.get("/readyz")).json()["ready"]
    assert (await client.post("/v1/jobs", json=body)).status_code == 202


async def test_a_storage_that_hangs_is_told_in_time(app, anyone, monkeypatch, nothing_is_kept):
    monkeypatch.setattr("service.api.health.SECONDS_TO_CHECK", 0.1)
    hangs = threading.Event()
    monkeypatch.setattr(app.state.components.files, "check", lambda: hangs.wait(10))
    try:
        answer = await asyncio.wait_for(anyone.get("/readyz"), 2)
    finally:
        hangs.set()
    assert (answer.status_code, answer.json()["storage"]["ok"]) == (503, False)


async def test_however_many_ask_each_component_is_asked_once(app, anyone, monkeypatch):
    asked = []
    cluster = app.state.components.ray.cluster

    async def count():
        asked.append(1)
        return await cluster()

    monkeypatch.setattr(app.state.components.ray, "cluster", count)
    answers = await asyncio.gather(*[anyone.get("/readyz") for _ in range(20)])
    assert {answer.status_code for answer in answers} == {200}
    assert len(asked) == 1


async def dispatcher_is_stuck(app, monkeypatch):
    monkeypatch.setattr("service.engine.dispatcher.STUCK_SECONDS", -1.0)


async def a_task_has_ended(app, monkeypatch):
    async def end():
        pass

    await asyncio.wait([app.state.background.start("one", end())])


async def leases_have_run_out(app, monkeypatch):
    monkeypatch.setattr(app.state.components.replica, "_renewed_at", -1_000.0)


@pytest.mark.parametrize("trouble", [dispatcher_is_stuck, a_task_has_ended, leases_have_run_out])
async def test_a_replica_that_does_not_look_after_jobs_is_not_ready(app, anyone, monkeypatch, trouble, nothing_is_kept):
    assert (await anyone.get("/readyz")).json()["dispatcher"] == {"ok": True, "detail": "looks after jobs"}
    await trouble(app, monkeypatch)
    answer = await anyone.get("/readyz")
    assert (answer.status_code, answer.json()["dispatcher"]["ok"]) == (503, False)
