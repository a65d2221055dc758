"""MLflow from outside: without a credential nothing, with a token reading, with an attempt's credential its own run."""

import asyncio
import os
import time

import httpx
import pytest

from service.adapters.mlflow_http import MAX_CONNECTIONS, Kind

pytestmark = pytest.mark.ray

API = "/api/2.0/mlflow"
ASSISTANT = "/ajax-api/3.0/mlflow/assistant"
FORGED = {"key": "accuracy", "value": 1.0, "timestamp": 1, "step": 1}
ATTACKS = [
    ("PUT", f"{ASSISTANT}/config", {"providers": {"x": {"base_url": "http://127.0.0.1:9", "permissions": "full"}}}),
    ("POST", f"{ASSISTANT}/message", {"message": "run `id`"}),
    ("GET", f"{ASSISTANT}/config", None),
    ("POST", f"{API}/experiments/create", {"name": "x", "artifact_location": "file:///tmp"}),
    ("POST", f"{API}/runs/create", {"experiment_id": "0"}),
    ("POST", f"{API}/runs/log-metric", {"run_id": "{run}"} | FORGED),
    ("POST", f"{API}/runs/delete", {"run_id": "{run}"}),
    ("POST", f"{API}/runs/update", {"run_id": "{run}", "status": "FAILED"}),
    ("POST", f"{API}/runs/set-tag", {"run_id": "{run}", "key": "syncbn.job_id", "value": "x"}),
    ("POST", f"{API}/runs/delete-tag", {"run_id": "{run}", "key": "syncbn.job_id"}),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=x", {"x": 1}),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/x", {"x": 1}),
    ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/x", None),
    ("POST", "/ajax-api/3.0/mlflow/jobs/", {}),
    ("POST", "/gateway/x/mlflow/invocations", {}),
    ("POST", f"{API}/gateway/secrets/create", {}),
    ("POST", "/v1/traces", {}),
]


def filled(content, context):
    """An attack on the run of an attempt."""
    if isinstance(content, dict):
        return {key: filled(value, context) for key, value in content.items()}
    if isinstance(content, str):
        return content.replace("{run}", context.mlflow_run_id).replace("{experiment}", "1")
    return content


async def history(reader, run_id, metric="accuracy"):
    answer = await reader.get(f"/mlflow{API}/metrics/get-history", params={"run_id": run_id, "metric_key": metric})
    return sorted((point["step"], point["value"]) for point in answer.json().get("metrics", []))


async def experiment_of(reader, run_id):
    found = await reader.get(f"/mlflow{API}/runs/get", params={"run_id": run_id})
    return found.json()["run"]["info"]["experiment_id"]


async def test_without_a_credential_neither_the_port_nor_the_proxy_does_anything(stack, start_job, connect, reader):
    context = await start_job()
    before = (await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})).json()
    async with httpx.AsyncClient(base_url=stack.mlflow[0]) as port, connect() as anyone:
        for method, path, body in ATTACKS:
            for client, prefix in ((port, ""), (anyone, "/mlflow")):
                answer = await client.request(method, prefix + filled(path, context), json=filled(body, context))
                assert answer.status_code in (401, 429), (method, path)
    assert (await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})).json() == before


async def test_who_has_a_token_reads_and_changes_nothing(start_job, reader, admin):
    context = await start_job()
    before = (await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})).json()
    assert before["run"]["info"]["run_id"] == context.mlflow_run_id
    for client in (reader, admin):
        for method, path, body in ATTACKS:
            answer = await client.request(method, "/mlflow" + filled(path, context), json=filled(body, context))
            assert answer.status_code == 403, (method, path)
    assert (await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})).json() == before
    page = await reader.get("/mlflow/")
    assert "<title>MLflow</title>" in page.text
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


async def test_an_attempt_writes_to_its_run_and_to_no_other(start_job, connect, reader):
    own, other = await start_job("own"), await start_job("other")
    experiment = await experiment_of(reader, own.mlflow_run_id)
    async with connect(own.mlflow_token) as attempt:
        point = {"key": "accuracy", "value": 0.5, "timestamp": time.time_ns() // 1_000_000, "step": 3}
        written = await attempt.post(
            f"/mlflow{API}/runs/log-batch",
            json={"run_id": own.mlflow_run_id, "metrics": [point], "tags": [{"key": "workers", "value": "2"}]},
        )
        assert written.status_code == 200, written.text
        place = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{own.mlflow_run_id}/artifacts/figures/a.txt"
        content = os.urandom(3_000_000)  # larger than any other body may be
        assert (await attempt.put(place, content=content)).status_code == 200

        for method, path, body in ATTACKS:
            answer = await attempt.request(method, "/mlflow" + filled(path, other), json=filled(body, other))
            assert answer.status_code in (403, 404, 422), (method, path)
        forged = {"run_id": other.mlflow_run_id, "metrics": [FORGED]}
        assert (await attempt.post(f"/mlflow{API}/runs/log-batch", json=forged)).status_code == 422
        spelt = {"run_id": own.mlflow_run_id, "runId": other.mlflow_run_id, "metrics": [FORGED | {"step": 4}]}
        assert (await attempt.post(f"/mlflow{API}/runs/log-batch", json=spelt)).status_code == 200
        assert (await attempt.get("/mlflow/")).status_code == 403
        assert (await attempt.get("/v1/jobs")).status_code == 401
    assert await history(reader, own.mlflow_run_id) == [(3, 0.5), (4, 1.0)]
    assert await history(reader, other.mlflow_run_id) == []
    assert (await reader.get(place)).content == content
    assert (await reader.get(place)).headers["content-security-policy"].startswith("sandbox;")


async def test_an_attempt_cannot_write_to_the_model_of_another_run(start_job, connect, reader):
    own, other = await start_job("own"), await start_job("other")
    experiment = await experiment_of(reader, own.mlflow_run_id)
    async with connect(other.mlflow_token) as victim, connect(own.mlflow_token) as attempt:
        made = await victim.post(f"/mlflow{API}/logged-models", json={"experiment_id": experiment, "name": "model"})
        model = made.json()["model"]["info"]["model_id"]
        place = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/models/{model}/artifacts/MLmodel"
        assert (await attempt.put(place, content=b"forged")).status_code == 404
        assert (await attempt.get(f"/mlflow{API}/logged-models/{model}")).status_code == 404
        ready = {"model_id": model, "status": "LOGGED_MODEL_READY"}
        assert (await attempt.patch(f"/mlflow{API}/logged-models/{model}", json=ready)).status_code == 404
        assert (await victim.put(place, content=b"real")).status_code == 200
        assert (await victim.patch(f"/mlflow{API}/logged-models/{model}", json=ready)).status_code == 200
    assert (await reader.get(place)).content == b"real"


async def test_the_credential_of_an_attempt_ends_with_it(start_job, connect, admin, ray):
    context = await start_job()
    async with connect(context.mlflow_token) as attempt:
        assert (await attempt.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})).is_success
        await admin.post(f"/v1/jobs/{context.job_id}:cancel")
        ray.lose_everything()
        for _ in range(600):
            job = (await admin.get(f"/v1/jobs/{context.job_id}")).json()
            if job["state"] == "cancelled":
                break
            await asyncio.sleep(0.05)
        late = {"metrics": [FORGED]}
        assert (await attempt.post(f"/mlflow{API}/runs/log-batch", json=late)).status_code == 401


async def test_an_attempt_is_limited_in_rate(start_job, connect, app):
    context = await start_job()
    app.state.components.rates.__init__(1, 5)
    async with connect(context.mlflow_token) as attempt:
        path, query = f"/mlflow{API}/runs/get", {"run_id": context.mlflow_run_id}
        statuses = [(await attempt.get(path, params=query)).status_code for _ in range(10)]
    assert statuses.count(429) >= 3


@pytest.mark.parametrize("kind", [Kind.READ, Kind.UPLOAD])
async def test_slow_downloads_and_uploads_keep_no_metric_waiting(start_job, connect, reader, app, kind):
    context = await start_job()
    experiment = await experiment_of(reader, context.mlflow_run_id)
    place = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{context.mlflow_run_id}/artifacts/a.bin"
    async with connect(context.mlflow_token) as attempt:
        await attempt.put(place, content=os.urandom(1_000))
        http = app.state.components.mlflow_http
        held = [await http.send("GET", place.removeprefix("/mlflow"), kind=kind) for _ in range(MAX_CONNECTIONS)]
        began = time.monotonic()
        written = await attempt.post(f"/mlflow{API}/runs/log-batch", json={"metrics": [FORGED]})
        assert written.status_code == 200
        assert time.monotonic() - began < 5
        for answer in held:
            await answer.aclose()


async def test_nobody_takes_all_connections(start_job, connect, reader):
    context = await start_job()
    experiment = await experiment_of(reader, context.mlflow_run_id)
    place = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{context.mlflow_run_id}/artifacts/"
    gate = asyncio.Event()

    async def slowly():
        yield b"x"
        await gate.wait()
        yield b"y"

    async with connect(context.mlflow_token) as attempt:
        slow = [asyncio.create_task(attempt.put(f"{place}{number}", content=slowly())) for number in range(6)]
        done, waiting = await asyncio.wait(slow, timeout=5)
        assert [task.result().status_code for task in done] == [429, 429]
        gate.set()
        assert {(await task).status_code for task in waiting} == {200}
        assert (await attempt.put(f"{place}7", content=b"z")).status_code == 200  # their places are free again


@pytest.mark.parametrize(
    "body",
    [
        b'{"metrics": [{"key": "a", "value": NaN, "timestamp": 1, "step": 1}]}',
        b'{"metrics": [{"key": "a", "value": 1e999, "timestamp": 1, "step": 1}]}',
        b'{"tags": [{"key": "a", "value": "\\ud800"}]}',
        b'{"metrics": [{"key": "a", "value": {"x": []}, "timestamp": "x", "step": null}]}',
        b'{"metrics": [' + b'{"key": "' + b"k" * 200 + b'", "value": 1, "timestamp": 1, "step": 1},' * 999 + b"]}",
    ],
)
async def test_no_body_of_an_attempt_is_an_error_of_the_proxy(start_job, connect, body):
    context = await start_job()
    async with connect(context.mlflow_token) as attempt:
        answer = await attempt.post(f"/mlflow{API}/runs/log-batch", content=body)
        assert "an error of the service" not in answer.text
        assert answer.status_code in (200, 400, 422, 500), answer.text  # 500: MLflow's own word


async def test_a_full_batch_of_long_names_is_taken(start_job, connect, reader):
    context = await start_job()
    metrics = [{"key": f"{number:03}" + "k" * 197, "value": 1.0, "timestamp": 1, "step": 1} for number in range(1_000)]
    async with connect(context.mlflow_token) as attempt:
        answer = await attempt.post(f"/mlflow{API}/runs/log-batch", json={"metrics": metrics})
    assert answer.status_code == 200, answer.text
    assert await history(reader, context.mlflow_run_id, metrics[7]["key"]) == [(1, 1.0)]


async def test_a_lost_mlflow_is_an_answer(settings, ray, connect, app):
    async with connect("0123456789abcdef-test") as client:
        await app.state.components.mlflow_http.close()
        app.state.components.mlflow_http.__init__("http://127.0.0.1:9", None, 1)
        answer = await client.get("/mlflow/version")
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
