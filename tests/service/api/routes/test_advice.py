import asyncio

SPEC = {
    "model": {"name": "mlp", "hidden": [8]},
    "data": {"name": "digits"},
    "steps": 10,
    "num_workers": 2,
    "global_batch_size": 4,
    "norm": "batch",
}


async def submitted(client, **changes):
    """Submit a job and return it once it has a run."""
    job = (await client.post("/v1/jobs", json={"name": "x", "spec": SPEC | changes})).json()
    async with asyncio.timeout(10):
        while (seen := (await client.get(f"/v1/jobs/{job['id']}")).json())["mlflow_run_id"] is None:
            await asyncio.sleep(0.01)
    return seen


async def test_advice_rests_on_the_measurements_of_the_run(client, mlflow):
    job = await submitted(client, global_batch_size=64)
    predicted = (await client.get(f"/v1/jobs/{job['id']}/advice")).json()
    assert (predicted["decision"], predicted["basis"], predicted["cost"]) == ("no need", "predicted", None)
    run = job["mlflow_run_id"]
    mlflow.curves |= {
        (run, "probe/norm1/variance_share"): [(0, 1 / 3)],
        (run, "probe/norm1/values_per_channel"): [(0, 32.0)],
        (run, "probe/sync_seconds"): [(0, 0.25)],
        (run, "probe/step_seconds"): [(5, 1.0)],
    }
    found = (await client.get(f"/v1/jobs/{job['id']}/advice")).json()
    assert (found["decision"], found["basis"], found["sync_group_size"]) == ("synchronise", "measured", 2)
    assert found["cost"] == {"sync_seconds": 0.25, "step_seconds": 1.0, "slowdown": 0.25}
    assert found["layers"][0]["shards_differ"]


async def test_a_job_without_a_run_gets_a_prediction(client, ray):
    ray.total = type(ray.total)(cpus=0)
    job = (await client.post("/v1/jobs", json={"name": "x", "spec": SPEC})).json()
    assert (await client.get(f"/v1/jobs/{job['id']}/advice")).json()["decision"] == "synchronise"
    assert (await client.get("/v1/jobs/job-0/advice")).status_code == 404


async def test_mlflow_that_does_not_answer_is_an_error(client, mlflow):
    job = await submitted(client)
    mlflow.is_down = True
    assert (await client.get(f"/v1/jobs/{job['id']}/advice")).status_code == 503


async def test_submissions_in_the_danger_zone_are_answered_with_a_warning(client):
    job = {"name": "x", "spec": SPEC}
    comparison = job | {"matrix": {"norm": ["batch", "sync"], "seed": [0, 1]}}
    for path, body in (("jobs", job), ("comparisons", comparison)):
        for route in (f"/v1/{path}", f"/v1/{path}:validate"):
            warnings = (await client.post(route, json=body)).json()["warnings"]
            assert len([text for text in warnings if "2 values per channel cost accuracy" in text]) == 1
    safe = (await client.post("/v1/jobs", json=job | {"spec": SPEC | {"norm": "sync"}})).json()
    assert safe["warnings"] == []
