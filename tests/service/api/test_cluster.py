"""What Ray has and has free, and how many jobs there are for it."""

from datetime import datetime

from service.domain.scheduling import Capacity
from tests.service.api.test_changes import end, submit


async def test_it_tells_what_ray_has_and_counts_jobs_by_state(app, client, ray, as_owner):
    ray.total, ray.free = Capacity(cpus=8, gpus=2), Capacity(cpus=3, gpus=1)
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


async def test_without_ray_the_queue_is_told_all_the_same(client, ray):
    ray.is_down = True
    job = await submit(client)
    seen = (await client.get("/v1/cluster")).json()
    assert (seen["total"], seen["free"], seen["jobs"]["queued"]) == (None, None, 1)
    assert datetime.fromisoformat(seen["oldest_queued_at"]) == datetime.fromisoformat(job["created_at"])


async def test_it_takes_a_token(anyone_else):
    assert (await anyone_else.get("/v1/cluster")).status_code == 401
