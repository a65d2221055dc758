import asyncio
import resource
import threading
from contextlib import contextmanager

import pytest

from tests.service.api.routes.test_jobs import SPEC


@pytest.fixture
def no_health_cache(monkeypatch):
    """Disable the cache: each readiness request runs new checks."""
    monkeypatch.setattr("service.api.health.CACHE_SECONDS", 0.0)


async def test_readiness_reports_each_component(anonymous, ray, mlflow, no_health_cache):
    assert (await anonymous.get("/livez")).status_code == 200
    ready = await anonymous.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    ray.is_down = True
    unready = await anonymous.get("/readyz")
    assert unready.status_code == 503
    assert unready.json()["ray"] == {"ok": False, "detail": "does not answer; see the log of the service"}
    assert unready.json()["database"]["ok"]
    mlflow.is_down = True
    assert not (await anonymous.get("/readyz")).json()["mlflow"]["ok"]


async def test_missing_storage_is_reported(anonymous, tmp_path, no_health_cache):
    assert (await anonymous.get("/readyz")).json()["storage"] == {"ok": True, "detail": "answers"}
    (tmp_path / "storage").rename(tmp_path / "unmounted")
    (tmp_path / "storage").mkdir()
    answer = await anonymous.get("/readyz")
    assert (answer.status_code, answer.json()["storage"]["ok"]) == (503, False)
    (tmp_path / "storage").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "storage")
    assert (await anonymous.get("/readyz")).json()["storage"]["ok"]


@contextmanager
def full_disk():
    """Limit file sizes of this process, like a full disk; mounting a small one needs privileges."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_jobs_are_rejected_while_the_disk_is_full(anonymous, client, no_health_cache, monkeypatch):
    monkeypatch.setattr("service.adapters.run_storage.PROBE_INTERVAL_SECONDS", 0.0)
    body = {"name": "mine", "spec": SPEC}
    with full_disk():
        answer = await anonymous.get("/readyz")
        refused = [
            await client.post("/v1/jobs", json=body),
            await client.post("/v1/comparisons", json=body | {"matrix": {"norm": ["none", "sync"]}}),
        ]
    assert (answer.status_code, answer.json()["storage"]) == (
        503,
        {"ok": False, "detail": "no space left on its disk"},
    )
    assert not answer.json()["database"]["ok"]
    for problem in refused:
        assert (problem.status_code, problem.json()["title"]) == (507, "Insufficient Storage")
        assert problem.json()["detail"].startswith("the storage has no space left")
    assert (await anonymous.get("/readyz")).json()["ready"]
    assert (await client.post("/v1/jobs", json=body)).status_code == 202


async def test_hanging_storage_is_reported_in_time(app, anonymous, monkeypatch, no_health_cache):
    monkeypatch.setattr("service.api.health.CHECK_TIMEOUT_SECONDS", 0.1)
    hangs = threading.Event()
    monkeypatch.setattr(app.state.components.files, "check", lambda: hangs.wait(10))
    try:
        answer = await asyncio.wait_for(anonymous.get("/readyz"), 2)
    finally:
        hangs.set()
    assert (answer.status_code, answer.json()["storage"]["ok"]) == (503, False)


@pytest.mark.parametrize("seconds", [0, 1.5])
async def test_concurrent_readiness_requests_share_one_check(app, anonymous, monkeypatch, seconds):
    asked = []
    cluster = app.state.components.ray.cluster

    async def count():
        asked.append(1)
        await asyncio.sleep(seconds)  # a slow check is shared as well
        return await cluster()

    monkeypatch.setattr(app.state.components.ray, "cluster", count)
    answers = await asyncio.gather(*[anonymous.get("/readyz") for _ in range(20)])
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


@pytest.mark.parametrize("break_replica", [dispatcher_is_stuck, a_task_has_ended, leases_have_run_out])
async def test_a_replica_that_does_not_reconcile_jobs_is_not_ready(
    app, anonymous, monkeypatch, break_replica, no_health_cache
):
    assert (await anonymous.get("/readyz")).json()["dispatcher"] == {"ok": True, "detail": "reconciles jobs"}
    await break_replica(app, monkeypatch)
    answer = await anonymous.get("/readyz")
    assert (answer.status_code, answer.json()["dispatcher"]["ok"]) == (503, False)
