"""Validation without storing, conditional requests, filters, and cloned and resumed jobs."""

import asyncio

import pytest

from service.domain.jobs import JobState, Transition
from tests.service.api.routes.test_jobs import SPEC

JOB = {"name": "first", "spec": SPEC, "priority": 3, "tags": ["team-a"], "retries": {"hang": 1}}


async def submit(client, **changes):
    answer = await client.post("/v1/jobs", json=JOB | changes)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def end(app, job_id, state="cancelled"):
    """End a job without Ray."""
    jobs = app.state.components.jobs
    job = await jobs.get(job_id)
    while job.state == JobState.QUEUED:
        job = await jobs.advance(
            job, Transition(state=JobState.SUBMITTED, reason="test"), "test"
        ) or await jobs.get(job_id)
    ended = Transition(state=JobState(state), reason="test")
    while (found := await jobs.advance(job, ended, "test")) is None:  # the dispatcher was first
        job = await jobs.get(job_id)
    return found


@pytest.fixture
def busy(ray):
    """Cluster without free resources: jobs stay queued."""
    ray.total = type(ray.total)(cpus=0)


async def test_a_dry_run_stores_nothing(client):
    answer = await client.post("/v1/jobs:validate", json=JOB | {"spec": SPEC | {"num_workers": [2, 30]}})
    assert answer.status_code == 200
    found = answer.json()
    assert (found["jobs"], found["min_resources"], found["max_resources"], found["fits"]) == (
        1, {"cpus": 2.0, "gpus": 0.0}, {"cpus": 30.0, "gpus": 0.0}, True,
    )  # fmt: skip
    assert found["spec"]["checkpoint"]["keep_last"] == 2
    bad = await client.post("/v1/jobs:validate", json=JOB | {"spec": SPEC | {"steps": 0}})
    assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, "spec.steps")
    body = {
        "name": "c",
        "spec": SPEC | {"num_workers": 9},
        "matrix": {"norm": ["none", "sync"], "seed": [0, 1]},
    }
    found = (await client.post("/v1/comparisons:validate", json=body)).json()
    assert (found["jobs"], found["fits"]) == (4, False)
    bad = await client.post("/v1/comparisons:validate", json=body | {"baseline": {"norm": "batch"}})
    assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, "baseline.norm")
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_without_ray_the_fit_is_unknown(client, ray):
    ray.is_down = True
    assert (await client.post("/v1/jobs:validate", json=JOB)).json()["fits"] is None


async def test_the_etag_changes_with_the_job(client, busy):
    job = await submit(client)
    path = f"/v1/jobs/{job['id']}"
    first = await client.get(path)
    assert (await client.get(path, headers={"If-None-Match": first.headers["ETag"]})).status_code in (
        200,
        304,
    )
    while True:  # until the dispatcher has stored the queue reason, after which nothing changes
        seen = await client.get(path)
        if "whole cluster" in seen.json()["reason"]:
            break
        await asyncio.sleep(0.05)
    again = await client.get(path, headers={"If-None-Match": seen.headers["ETag"]})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", seen.headers["ETag"])
    refused = await client.post(f"{path}:cancel", headers={"If-Match": '"1-0"'})
    assert refused.status_code == 412
    assert "has changed since: it is queued" in refused.json()["detail"]
    assert not (await client.get(path)).json()["cancel_requested"]
    taken = await client.post(f"{path}:cancel", headers={"If-Match": seen.headers["ETag"]})
    assert (taken.status_code, taken.json()["cancel_requested"]) == (202, True)


async def test_lists_are_filtered_and_paginated(client, busy):
    for number in range(3):
        await submit(client, name=f"plain {number}", spec=SPEC | {"norm": "none"})
    synced = await submit(client, tags=[])

    async def names(**query):
        answer = await client.get("/v1/jobs", params=query)
        assert answer.status_code == 200, answer.text
        return [job["name"] for job in answer.json()["jobs"]], answer.json()["next_page_token"]

    assert (await names(norm="sync"))[0] == [synced["name"]]
    assert (await names(tag="team-a", state="queued", owner="admin"))[0] == ["plain 2", "plain 1", "plain 0"]
    first, token = await names(tag="team-a", page_size=2)
    assert first == ["plain 2", "plain 1"]
    assert await names(tag="team-a", page_size=2, page_token=token) == (["plain 0"], None)
    assert (await names(owner="nobody"))[0] == []
    assert (await names(comparison="comparison-0"))[0] == []
    bad = await client.get("/v1/jobs", params={"state": "asleep"})
    assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, "state")


async def test_a_clone_differs_only_in_overridden_fields(client, busy):
    job = await submit(client)
    answer = await client.post(f"/v1/jobs/{job['id']}:clone", json={"overrides": {"optimizer.lr": 0.25}})
    assert answer.status_code == 202, answer.text
    new = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{new['id']}"
    assert new["cloned_from"] == job["id"]
    assert new["spec"] == job["spec"] | {"optimizer": job["spec"]["optimizer"] | {"lr": 0.25}}
    assert [new[name] for name in ("name", "priority", "tags", "retries")] == [
        job[name] for name in ("name", "priority", "tags", "retries")
    ]
    for overrides, field, rule in [
        ({"optimizer.learning": 1}, "overrides.optimizer.learning", "must be a path into the spec"),
        ({"optimizer.lr": -1}, "overrides.optimizer.lr", "greater than 0"),
        ({"optimizer": {"lr": 1}, "optimizer.lr": 2}, "overrides.optimizer.lr", "set as a whole already"),
    ]:
        bad = await client.post(f"/v1/jobs/{job['id']}:clone", json={"overrides": overrides})
        assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, field)
        assert rule in bad.json()["errors"][0]["message"]
    assert (await client.post("/v1/jobs/job-0:clone", json={})).status_code == 404


async def test_an_ended_job_can_be_resumed(app, client, busy):
    job = await submit(client)
    early = await client.post(f"/v1/jobs/{job['id']}:resume", json={})
    assert (early.status_code, early.json()["detail"]) == (
        409, f"job {job['id']} is queued; only jobs that are paused or have ended can be resumed",
    )  # fmt: skip
    await end(app, job["id"])
    answer = await client.post(
        f"/v1/jobs/{job['id']}:resume", json={"name": "again", "overrides": {"steps": 77}}
    )
    assert answer.status_code == 202, answer.text
    new = answer.json()
    assert (new["resumed_from"], new["name"], new["spec"]["steps"], new["attempt"]) == (
        job["id"],
        "again",
        77,
        1,
    )
    for path, value in [
        ("optimizer.lr", 0.25),
        ("seed", 4),
        ("checkpoint.address", "/x"),
        ("checkpoint", {}),
    ]:
        bad = await client.post(f"/v1/jobs/{job['id']}:resume", json={"overrides": {path: value}})
        assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, f"overrides.{path}")
    assert len((await client.get("/v1/jobs")).json()["jobs"]) == 2


async def test_a_completed_job_is_resumed_only_with_more_steps(app, client, busy):
    job = await submit(client)
    await end(app, job["id"], "succeeded")
    assert (await client.post(f"/v1/jobs/{job['id']}:resume", json={})).status_code == 409
    more = await client.post(f"/v1/jobs/{job['id']}:resume", json={"overrides": {"steps": 99}})
    assert more.status_code == 202


async def test_extending_a_cosine_schedule_needs_an_explicit_choice(app, client, busy):
    job = await submit(client, spec=SPEC | {"lr_schedule": {"name": "cosine"}})
    await end(app, job["id"], "succeeded")
    address, steps = f"/v1/jobs/{job['id']}:resume", job["spec"]["steps"]
    bad = await client.post(address, json={"overrides": {"steps": 2 * steps}})
    assert (bad.status_code, bad.json()["errors"][0]["field"]) == (422, "overrides.on_extend")
    assert f"over {steps} steps" in bad.json()["errors"][0]["message"]
    more = await client.post(address, json={"overrides": {"steps": 2 * steps, "on_extend": "rescale"}})
    assert more.status_code == 202


async def test_validation_warns_about_fields_without_effect(client):
    answer = await client.post(
        "/v1/jobs:validate", json=JOB | {"spec": SPEC | {"num_workers": 1, "parallel": "fsdp"}}
    )
    assert answer.json()["warnings"] == ["parallel: has no effect on one worker (got 'fsdp')"]
