"""Resources of Ray and counts of jobs."""

from datetime import datetime

from service.domain.lifecycle import RayStatus
from service.domain.resources import Resources
from tests.service.api.routes.test_jobs import until
from tests.service.api.routes.test_validation import end, submit


async def test_cluster_reports_resources_and_job_counts_by_state(app, client, ray, as_owner):
    ray.total, ray.free = Resources(cpus=8, gpus=2), Resources(cpus=3, gpus=1)
    before = (await client.get("/v1/cluster")).json()
    assert (before["jobs"]["queued"], before["oldest_queued_at"]) == (0, None)
    ray.is_down = True  # nothing is dispatched
    first, second = await submit(client), await submit(client)
    await end(app, second["id"], "failed")
    ray.is_down = False
    reader = await as_owner("ann", "read")
    seen = (await reader.get("/v1/cluster")).json()
    assert seen["total"] == {"cpus": 8, "gpus": 2}
    assert seen["free"] == {"cpus": 3, "gpus": 1}
    assert seen["jobs"].keys() == {"queued", "submitted", "running", "succeeded", "failed", "cancelled"}
    assert (seen["jobs"]["failed"], sum(seen["jobs"].values())) == (1, 2)
    assert first["owner"] not in str(seen)


async def test_the_queue_is_reported_without_ray(client, ray):
    ray.is_down = True
    job = await submit(client)
    seen = (await client.get("/v1/cluster")).json()
    assert (seen["total"], seen["free"], seen["jobs"]["queued"]) == (None, None, 1)
    assert datetime.fromisoformat(seen["oldest_queued_at"]) == datetime.fromisoformat(job["created_at"])


async def test_usage_is_shown_to_its_owner_and_to_admins(app, client, ray, as_owner):
    ann, bob = await as_owner("ann", "submit"), await as_owner("bob", "read")
    job = await submit(ann)
    await until(ann, job, "submitted")
    ray.set(f"{job['id']}-a1", RayStatus.RUNNING)
    await until(ann, job, "running")
    (used,) = (await ann.get("/v1/usage")).json()["usage"]
    assert used["owner"] == "ann"
    assert used["cpu_hours"] > 0 == used["gpu_hours"]
    seen = (await ann.get(f"/v1/jobs/{job['id']}")).json()
    assert 0 < seen["cpu_hours"] < 1
    listed = (await ann.get("/v1/jobs")).json()["jobs"][0]
    assert listed["cpu_hours"] > seen["cpu_hours"]
    assert (await bob.get("/v1/usage")).json()["usage"] == []
    assert [each["owner"] for each in (await client.get("/v1/usage")).json()["usage"]] == ["ann"]
    before = await client.get("/v1/usage", params={"until": "2026-01-01"})
    assert sum(each["cpu_hours"] for each in before.json()["usage"]) == 0
    assert (await client.get("/v1/usage", params={"since": "yesterday"})).status_code == 422


async def test_the_cluster_needs_a_token(other_anonymous):
    assert (await other_anonymous.get("/v1/cluster")).status_code == 401
