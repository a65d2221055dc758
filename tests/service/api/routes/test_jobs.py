import asyncio
import threading
from pathlib import Path

import pytest

from service.domain.errors import UpstreamUnavailable
from service.domain.lifecycle import RayStatus
from service.domain.mlflow_views import LAYOUT
from tests.service.api.conftest import ON_BOTH_DATABASES
from trainer.jobspec import LOG_FILE, OUTCOME_FILE, STOP_FILE, Outcome, attempt_folder

SPEC = {"steps": 10, "num_workers": 2}


async def submit(client, **changes):
    answer = await client.post("/v1/jobs", json={"name": "mine", "spec": SPEC} | changes)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def until(client, job, *states):
    async with asyncio.timeout(10):
        while (seen := (await client.get(f"/v1/jobs/{job['id']}")).json())["state"] not in states:
            await asyncio.sleep(0.01)
    return seen


@ON_BOTH_DATABASES
async def test_a_job_is_accepted_and_shown(client):
    answer = await client.post("/v1/jobs", json={"name": "mine", "spec": SPEC})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["attempt"], job["progress"]) == ("queued", 1, None)
    seen = await until(client, job, "submitted")
    assert seen["spec"]["global_batch_size"] == 60
    assert (
        seen["mlflow_url"] == f"http://syncbn.example/mlflow/#/experiments/1/runs/run-of-{job['id']}?{LAYOUT}"
    )


@ON_BOTH_DATABASES
async def test_the_timeline_of_a_job_records_its_end(client, app, ray):
    job = await submit(client)
    await until(client, job, "submitted")
    ray.set(f"{job['id']}-a1", RayStatus.RUNNING)
    await until(client, job, "running")
    files = app.state.components.files
    folder = attempt_folder(files._storage / job["id"], 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME_FILE).write_text(
        Outcome(state="failed", reason="worker 0: ValueError: no").model_dump_json()
    )
    (folder / LOG_FILE).write_text("step 1\n")
    ray.set(f"{job['id']}-a1", RayStatus.FAILED)
    seen = await until(client, job, "failed")
    assert seen["reason"] == "worker 0: ValueError: no"
    assert seen["ended_at"] > seen["started_at"] >= seen["created_at"]
    events = (await client.get(f"/v1/jobs/{job['id']}/events")).json()["events"]
    assert [event["state"] for event in events] == ["queued", "submitted", "running", "failed"]
    log = await client.get(f"/v1/jobs/{job['id']}/logs")
    assert (log.text, log.headers["content-type"]) == ("step 1\n", "text/plain; charset=utf-8")


@pytest.fixture
async def hanging(client, app, monkeypatch):
    """Storage of a job's log that does not answer until the event is set."""
    monkeypatch.setattr("service.adapters.run_storage.STORAGE_SECONDS", 0.3)
    job = await submit(client)
    log = app.state.components.files.log_path(await app.state.components.jobs.get(job["id"]), 1)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("step 1\n")
    answers = threading.Event()
    yield log, f"/v1/jobs/{job['id']}/logs", answers
    answers.set()


async def test_a_hanging_log_lookup_does_not_delay_others(client, monkeypatch, hanging):
    log, path, answers = hanging
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: (path != log or answers.wait(5)) and is_file(path))
    async with asyncio.timeout(3):
        reading = asyncio.create_task(client.get(path))
        await asyncio.sleep(0.05)
        assert (await client.get("/livez")).is_success
        assert not reading.done()
        answer = await reading
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


async def test_a_log_without_new_lines_times_out(client, monkeypatch, hanging):
    _, path, answers = hanging

    def read(self, is_over):
        answers.wait(5)
        yield from ()

    monkeypatch.setattr("service.adapters.job_log.AttemptLog.read", read)
    async with asyncio.timeout(3):
        with pytest.raises(RuntimeError, match="already started") as broken:
            await client.get(path)
    assert isinstance(broken.value.__cause__, UpstreamUnavailable)


async def test_logs_come_from_ray_until_log_files_exist(client, ray):
    job = await submit(client)
    await until(client, job, "submitted")
    async with asyncio.timeout(10):  # the state is stored before the job is submitted to Ray
        while f"{job['id']}-a1" not in ray.submissions:
            await asyncio.sleep(0.01)
    assert (await client.get(f"/v1/jobs/{job['id']}/logs")).text == f"log of {job['id']}-a1"
    refused = await client.get(f"/v1/jobs/{job['id']}/logs?attempt=2")
    assert refused.status_code == 422
    assert refused.json()["errors"] == [{"field": "attempt", "value": 2, "message": "must be 1 to 1"}]


@ON_BOTH_DATABASES
async def test_cancelling(client, ray):
    ray.is_down = True
    job = await submit(client)
    answer = await client.post(f"/v1/jobs/{job['id']}:cancel")
    assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)
    await until(client, job, "cancelled")
    assert (await client.post(f"/v1/jobs/{job['id']}:cancel")).status_code == 202
    ray.is_down = False
    ended = await submit(client)
    await until(client, ended, "submitted")
    ray.set(f"{ended['id']}-a1", RayStatus.STOPPED)
    assert "stopped in Ray" in (await until(client, ended, "failed"))["reason"]
    refused = await client.post(f"/v1/jobs/{ended['id']}:cancel")
    assert refused.status_code == 409
    assert refused.headers["content-type"] == "application/problem+json"
    assert "already failed" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": {"name": "import:os:system"}}, "spec.model.name"),
        ({"data": {"name": "imagefolder", "root": "/etc"}}, "spec.data.root"),
        ({"checkpoint": {"address": "/root/.ssh"}}, "spec.checkpoint.address"),
    ],
)
async def test_specs_that_the_operator_does_not_allow_are_rejected_and_not_stored(client, change, field):
    answer = await client.post("/v1/jobs", json={"name": "mine", "spec": SPEC | change})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert "the operator allows them" in answer.json()["errors"][0]["message"]
    comparison = {"name": "mine", "spec": SPEC | change, "matrix": {"seed": [0, 1]}}
    assert (await client.post("/v1/comparisons", json=comparison)).status_code == 422
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


@ON_BOTH_DATABASES
async def test_lists_are_paginated(client):
    ids = [(await submit(client))["id"] for _ in range(5)]
    seen, token = [], None
    while True:
        page = (
            await client.get("/v1/jobs", params={"page_size": 2} | ({"page_token": token} if token else {}))
        ).json()
        seen += [job["id"] for job in page["jobs"]]
        if (token := page["next_page_token"]) is None:
            break
    assert seen == ids[::-1]
    for query in (
        "page_size=0",
        "page_size=x",
        "page_token=zz",
        "page_token=LTE",
        "page_token=OTk5OTk5OTk5OTk5",
    ):
        refused = await client.get(f"/v1/jobs?{query}")
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["field"] == query.split("=")[0]


@pytest.mark.parametrize(
    ("change", "field", "rule"),
    [
        ({"spec": SPEC | {"optimizer": {"lr": -1}}}, "spec.optimizer.lr", "greater than 0"),
        ({"spec": SPEC | {"optimizer": {"lr": "fast"}}}, "spec.optimizer.lr", "valid number"),
        (
            {"spec": SPEC | {"model": {"name": "mlp", "hidden": [3, 0]}}},
            "spec.model.hidden[1]",
            "greater than or equal to 1",
        ),
        (
            {"spec": SPEC | {"model": {"name": "vgg"}}},
            "spec.model",
            "name must be mlp, cnn, torchvision:<name>",
        ),
        (
            {"spec": SPEC | {"data": {"name": "cifar"}}},
            "spec.data",
            "name must be mnist5k, digits, synthetic",
        ),
        ({"spec": SPEC | {"data": {"name": "digits", "root": "/etc"}}}, "spec.data.root", "no such field"),
        ({"spec": SPEC | {"norm": "instance"}}, "spec.norm", "'none', 'batch', 'sync', 'group' or 'layer'"),
        ({"spec": SPEC | {"global_batch_size": 1}}, "spec.global_batch_size", "must be between 2 and 4000"),
        ({"spec": SPEC | {"num_workers": True}}, "spec.num_workers", "valid integer"),
        ({"spec": SPEC | {"colour": "red"}}, "spec.colour", "no such field"),
        ({"spec": {}}, "spec.steps", "required"),
        ({"name": "a\nb"}, "name", "pattern"),
        ({"name": ""}, "name", "at least 1 character"),
        ({"colour": 3}, "colour", "no such field"),
    ],
)
async def test_an_invalid_field_is_named_and_nothing_is_stored(client, change, field, rule):
    answer = await client.post("/v1/jobs", json={"name": "mine", "spec": SPEC} | change)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 422
    assert [error["field"] for error in problem["errors"]] == [field]
    assert rule in problem["errors"][0]["message"]
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


@pytest.mark.parametrize(
    "body",
    ["{", "[]", "", '{"name": "x", "spec": {"steps": NaN}}', '{"name": "x", "spec": {"steps": 1e999}}'],
)
async def test_a_body_that_is_not_a_json_object_is_rejected(client, body):
    answer = await client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"]


@ON_BOTH_DATABASES
async def test_text_that_utf_8_cannot_encode_is_rejected_with_422(client):
    for body in (
        '{"name": "\\ud800", "spec": {"steps": 1}}',
        '{"name": "x", "spec": {"\\ud800": 1}}',
        '{"name": "x\\u0000", "spec": {"steps": 1}}',
    ):
        answer = await client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, body
        assert answer.json()["errors"]


async def test_an_endless_body_is_rejected(client):
    answer = await client.post("/v1/jobs", json={"name": "x" * 2_000_000, "spec": SPEC})
    assert answer.status_code == 413


async def test_a_log_that_grows_while_it_is_read_is_complete(client, app):
    job = await submit(client)
    folder = attempt_folder(app.state.components.files._storage / job["id"], 1)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("w") as log:
        log.write("line\n" * 200_000)
        log.flush()
        async with client.stream("GET", f"/v1/jobs/{job['id']}/logs") as answer:
            assert "content-length" not in answer.headers
            received = b""
            async for chunk in answer.aiter_bytes():
                received += chunk
                log.write("more\n" * 10_000)
                log.flush()
    assert received == b"line\n" * 200_000


@ON_BOTH_DATABASES
async def test_unknown_objects_are_not_found(client):
    for path in (
        "/v1/jobs/job-0",
        "/v1/jobs/job-0/logs",
        "/v1/jobs/job-0/events",
        "/v1/comparisons/comparison-0",
        "/v1/nothing",
    ):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["title"]) == (404, "Not Found"), path


@ON_BOTH_DATABASES
async def test_a_running_job_is_paused_and_resumed(client, app, ray):
    job = await submit(client, preemptible=True)
    assert job["preemptible"]
    address, first = f"/v1/jobs/{job['id']}", f"{job['id']}-a1"
    await until(client, job, "submitted")
    ray.set(first, RayStatus.RUNNING)
    seen = await until(client, job, "running")
    etag = (await client.get(address)).headers["ETag"]
    asked = await client.post(f"{address}:pause", headers={"If-Match": etag})
    assert (asked.status_code, asked.json()["pause_requested"], asked.json()["state"]) == (
        202,
        True,
        "running",
    )
    assert (await client.post(f"{address}:pause", headers={"If-Match": etag})).status_code == 412
    again = await client.post(f"{address}:pause")  # changes nothing
    assert (again.status_code, again.json()["state"]) == (202, "running")
    folder = attempt_folder(app.state.components.files._storage / job["id"], 1)
    async with asyncio.timeout(10):
        while not (folder / STOP_FILE).exists():
            await asyncio.sleep(0.01)
    saved = Outcome(state="failed", reason="stopped on request; saved after 3 steps", cause="preempted")
    (folder / OUTCOME_FILE).write_text(saved.model_dump_json())
    ray.set(first, RayStatus.FAILED)
    seen = await until(client, job, "queued")
    assert (seen["attempt"], seen["pause_requested"], seen["failures"]) == (2, True, {})
    assert seen["reason"] == "paused: attempt 1 saved its state"
    changed = await client.post(f"{address}:resume", json={"overrides": {"steps": 3}})
    assert (changed.status_code, "without overrides" in changed.json()["detail"]) == (409, True)
    key = {"Idempotency-Key": "once"}
    for _ in range(2):
        resumed = await client.post(f"{address}:resume", json={}, headers=key)
        assert (resumed.status_code, resumed.json()["id"]) == (202, job["id"])
        assert not resumed.json()["pause_requested"]
    await until(client, job, "submitted")
    events = (await client.get(f"{address}/events")).json()["events"]
    assert [(event["state"], event["reason"], event["actor"]) for event in events][3:] == [
        ("running", "pause requested", "admin"),
        ("queued", "paused: attempt 1 saved its state", "dispatcher"),
        ("queued", "resumption requested", "admin"),
        ("submitted", "attempt 2 goes to Ray", "dispatcher"),
    ]


@ON_BOTH_DATABASES
async def test_a_paused_job_can_be_cancelled_and_an_ended_one_not_paused(client, ray, as_owner):
    ray.is_down = True  # it stays in the queue
    job = await submit(client)
    address = f"/v1/jobs/{job['id']}"
    paused = (await client.post(f"{address}:pause")).json()
    assert (paused["state"], paused["reason"]) == ("queued", "paused by admin")
    other, reader = await as_owner("ann", "submit"), await as_owner("admin", "read")
    assert (await other.post(f"{address}:pause")).status_code == 404
    assert (await reader.post(f"{address}:pause")).status_code == 403
    assert (await client.post(f"{address}:cancel")).status_code == 202
    seen = await until(client, job, "cancelled")
    assert not seen["pause_requested"]
    answer = await client.post(f"{address}:pause")
    assert answer.status_code == 409
    assert answer.json()["detail"] == f"job {job['id']} has already cancelled; it can no longer be paused"
