"""MLflow from outside: no access without a credential, read access with a token, and write access to its own
run with the credential of an attempt.
"""

import asyncio
import os
import time

import httpx
import pytest

from service.adapters.mlflow_http import MAX_CONNECTIONS, Kind
from service.api import mlflow_proxy
from service.domain import mlflow_queries

pytestmark = pytest.mark.ray

API = "/api/2.0/mlflow"
ASSISTANT = "/ajax-api/3.0/mlflow/assistant"
FORGED = {"key": "accuracy", "value": 1.0, "timestamp": 1, "step": 1}
VIEW = {"experiment_id": "{experiment}", "key": "mlflow.sharedViewState.comparison-1", "value": "{}"}
"""Saved view of a comparison, which only the service may write."""
ATTACKS = [
    (
        "PUT",
        f"{ASSISTANT}/config",
        {"providers": {"x": {"base_url": "http://127.0.0.1:9", "permissions": "full"}}},
    ),
    ("POST", f"{ASSISTANT}/message", {"message": "run `id`"}),
    ("GET", f"{ASSISTANT}/config", None),
    ("POST", f"{API}/experiments/create", {"name": "x", "artifact_location": "file:///tmp"}),
    ("POST", f"{API}/experiments/set-experiment-tag", VIEW),
    ("POST", "/ajax-api/2.0/mlflow/experiments/set-experiment-tag", VIEW),
    ("POST", f"{API}/experiments/delete-experiment-tag", VIEW),
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
    """Return an attack with the ids of a run filled in."""
    if isinstance(content, dict):
        return {key: filled(value, context) for key, value in content.items()}
    if isinstance(content, str):
        return content.replace("{run}", context.mlflow_run_id).replace("{experiment}", "1")
    return content


async def history(reader, run_id, metric="accuracy"):
    answer = await reader.get(
        f"/mlflow{API}/metrics/get-history", params={"run_id": run_id, "metric_key": metric}
    )
    return sorted((point["step"], point["value"]) for point in answer.json().get("metrics", []))


async def experiment_of(reader, run_id):
    found = await reader.get(f"/mlflow{API}/runs/get", params={"run_id": run_id})
    return found.json()["run"]["info"]["experiment_id"]


async def test_port_and_proxy_reject_requests_without_a_credential(stack, start_job, connect, reader):
    context = await start_job()
    before = (await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})).json()
    async with httpx.AsyncClient(base_url=stack.mlflow[0]) as port, connect() as anonymous:
        for method, path, body in ATTACKS:
            for client, prefix in ((port, ""), (anonymous, "/mlflow")):
                answer = await client.request(
                    method, prefix + filled(path, context), json=filled(body, context)
                )
                assert answer.status_code in (401, 429), (method, path)
    assert (
        await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})
    ).json() == before


async def test_a_token_reads_and_cannot_write(start_job, reader, admin):
    context = await start_job()
    before = (await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})).json()
    assert before["run"]["info"]["run_id"] == context.mlflow_run_id
    for client in (reader, admin):
        for method, path, body in ATTACKS:
            answer = await client.request(
                method, "/mlflow" + filled(path, context), json=filled(body, context)
            )
            assert answer.status_code == 403, (method, path)
    assert (
        await reader.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})
    ).json() == before
    page = await reader.get("/mlflow/")
    assert "<title>MLflow</title>" in page.text
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


async def test_an_attempt_writes_only_to_its_own_run(start_job, connect, reader):
    own, other = await start_job("own"), await start_job("other")
    experiment = await experiment_of(reader, own.mlflow_run_id)
    async with connect(own.mlflow_token) as attempt:
        point = {"key": "accuracy", "value": 0.5, "timestamp": time.time_ns() // 1_000_000, "step": 3}
        written = await attempt.post(
            f"/mlflow{API}/runs/log-batch",
            json={
                "run_id": own.mlflow_run_id,
                "metrics": [point],
                "tags": [{"key": "workers", "value": "2"}],
            },
        )
        assert written.status_code == 200, written.text
        artifacts = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{own.mlflow_run_id}/artifacts"
        figure = f"{artifacts}/figures/a.txt"
        content = os.urandom(3_000_000)  # larger than any other body may be
        assert (await attempt.put(figure, content=content)).status_code == 200

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
    assert (await reader.get(figure)).content == content
    assert (await reader.get(figure)).headers["content-security-policy"].startswith("sandbox;")


async def test_an_attempt_cannot_write_to_the_model_of_another_run(start_job, connect, reader):
    own, other = await start_job("own"), await start_job("other")
    experiment = await experiment_of(reader, own.mlflow_run_id)
    async with connect(other.mlflow_token) as victim, connect(own.mlflow_token) as attempt:
        made = await victim.post(
            f"/mlflow{API}/logged-models", json={"experiment_id": experiment, "name": "model"}
        )
        model = made.json()["model"]["info"]["model_id"]
        path = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/models/{model}/artifacts/MLmodel"
        assert (await attempt.put(path, content=b"forged")).status_code == 404
        assert (await attempt.get(f"/mlflow{API}/logged-models/{model}")).status_code == 404
        ready = {"model_id": model, "status": "LOGGED_MODEL_READY"}
        assert (await attempt.patch(f"/mlflow{API}/logged-models/{model}", json=ready)).status_code == 404
        assert (await victim.put(path, content=b"real")).status_code == 200
        assert (await victim.patch(f"/mlflow{API}/logged-models/{model}", json=ready)).status_code == 200
    assert (await reader.get(path)).content == b"real"


async def test_the_credential_of_an_attempt_expires_with_the_attempt(start_job, connect, admin, ray):
    context = await start_job()
    async with connect(context.mlflow_token) as attempt:
        assert (
            await attempt.get(f"/mlflow{API}/runs/get", params={"run_id": context.mlflow_run_id})
        ).is_success
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
async def test_slow_downloads_and_uploads_do_not_delay_metrics(start_job, connect, reader, app, kind):
    context = await start_job()
    experiment = await experiment_of(reader, context.mlflow_run_id)
    path = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{context.mlflow_run_id}/artifacts/a.bin"
    async with connect(context.mlflow_token) as attempt:
        await attempt.put(path, content=os.urandom(1_000))
        http = app.state.components.mlflow_http
        held = [
            await http.send("GET", path.removeprefix("/mlflow"), kind=kind) for _ in range(MAX_CONNECTIONS)
        ]
        began = time.monotonic()
        written = await attempt.post(f"/mlflow{API}/runs/log-batch", json={"metrics": [FORGED]})
        assert written.status_code == 200
        assert time.monotonic() - began < 5
        for answer in held:
            await answer.aclose()


async def test_one_client_cannot_occupy_all_connections(start_job, connect, reader):
    context = await start_job()
    experiment = await experiment_of(reader, context.mlflow_run_id)
    path = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{context.mlflow_run_id}/artifacts/"
    gate = asyncio.Event()

    async def slowly():
        yield b"x"
        await gate.wait()
        yield b"y"

    async with connect(context.mlflow_token) as attempt:
        slow = [asyncio.create_task(attempt.put(f"{path}{number}", content=slowly())) for number in range(6)]
        done, waiting = await asyncio.wait(slow, timeout=5)
        assert [task.result().status_code for task in done] == [429, 429]
        gate.set()
        assert {(await task).status_code for task in waiting} == {200}
        assert (
            await attempt.put(f"{path}7", content=b"z")
        ).status_code == 200  # their connections are free again


@pytest.mark.parametrize(
    "body",
    [
        b'{"metrics": [{"key": "a", "value": NaN, "timestamp": 1, "step": 1}]}',
        b'{"metrics": [{"key": "a", "value": 1e999, "timestamp": 1, "step": 1}]}',
        b'{"tags": [{"key": "a", "value": "\\ud800"}]}',
        b'{"metrics": [{"key": "a", "value": {"x": []}, "timestamp": "x", "step": null}]}',
        b'{"metrics": ['
        + b'{"key": "'
        + b"k" * 200
        + b'", "value": 1, "timestamp": 1, "step": 1},' * 999
        + b"]}",
    ],
)
async def test_malformed_bodies_of_an_attempt_cause_no_proxy_error(start_job, connect, body):
    context = await start_job()
    async with connect(context.mlflow_token) as attempt:
        answer = await attempt.post(f"/mlflow{API}/runs/log-batch", content=body)
        assert "an error of the service" not in answer.text
        assert answer.status_code in (200, 400, 422, 500), answer.text  # 500: a response of MLflow itself


async def test_a_full_batch_with_long_names_is_accepted(start_job, connect, reader):
    context = await start_job()
    metrics = [
        {"key": f"{number:03}" + "k" * 197, "value": 1.0, "timestamp": 1, "step": 1}
        for number in range(1_000)
    ]
    async with connect(context.mlflow_token) as attempt:
        answer = await attempt.post(f"/mlflow{API}/runs/log-batch", json={"metrics": metrics})
    assert answer.status_code == 200, answer.text
    assert await history(reader, context.mlflow_run_id, metrics[7]["key"]) == [(1, 1.0)]


async def test_the_proxy_answers_when_mlflow_is_unreachable(settings, ray, connect, app):
    async with connect("0123456789abcdef-test") as client:
        await app.state.components.mlflow_http.close()
        app.state.components.mlflow_http.__init__("http://127.0.0.1:9", None, 1)
        answer = await client.get("/mlflow/version")
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")


async def logged(connect, context, points):
    """Log points of a metric as an attempt."""
    metrics = [{"key": "accuracy", "value": 0.5, "timestamp": 1, "step": step} for step in range(points)]
    async with connect(context.mlflow_token) as attempt:
        assert (await attempt.post(f"/mlflow{API}/runs/log-batch", json={"metrics": metrics})).is_success


async def test_queries_of_readers_are_bounded_and_paginated(start_job, connect, reader, monkeypatch):
    context, other = await start_job(), await start_job()
    await logged(connect, context, 30)
    await logged(connect, other, 30)
    for route in mlflow_queries.MAX_RESULTS:
        monkeypatch.setitem(mlflow_queries.MAX_RESULTS, route, 20 if "history" in route else 1)
    monkeypatch.setattr(mlflow_queries, "MAX_POINTS", 24)
    run, runs = context.mlflow_run_id, [context.mlflow_run_id, other.mlflow_run_id]

    async def get(route, **params):
        return await reader.get(
            f"/mlflow/ajax-api/2.0/mlflow/{route}", params={"metric_key": "accuracy"} | params
        )

    first = (await get("metrics/get-history", run_id=run)).json()
    assert len(first["metrics"]) == 20
    rest = (await get("metrics/get-history", run_id=run, page_token=first["next_page_token"])).json()
    assert {point["step"] for point in first["metrics"] + rest["metrics"]} == set(range(30))
    assert (
        len((await get("metrics/get-history-bulk", run_id=runs, max_results=25_000)).json()["metrics"]) == 20
    )
    assert (await get("metrics/get-history-bulk", run_id=runs, max_results=-1)).status_code == 422
    assert (
        len((await get("metrics/get-history-bulk-interval", run_ids=runs, max_results=20)).json()["metrics"])
        == 24
    )

    experiment = await experiment_of(reader, run)
    search = {"experiment_ids": [experiment], "max_results": 50_000}
    found = (await reader.post(f"/mlflow{API}/runs/search", json=search)).json()
    assert len(found["runs"]) == 1
    assert found["next_page_token"]
    assert (
        await reader.post(f"/mlflow{API}/runs/search", json=search | {"filter": "x" * 100_000})
    ).status_code == 413


async def test_graphql_queries_of_the_ui_are_answered_and_bounded(start_job, connect, reader, monkeypatch):
    context, other = await start_job(), await start_job()
    await logged(connect, context, 30)
    monkeypatch.setitem(mlflow_queries.MAX_RESULTS, "runs/search", 1)
    monkeypatch.setattr(mlflow_queries, "MAX_POINTS", 12)
    experiment = await experiment_of(reader, context.mlflow_run_id)

    async def ask(field, selection, data):
        kind = f"M{field[1:]}Input!"
        query = (
            f'query Q($data: {kind}) @component(name: "x") '
            f"{{ {field}(input: $data) {{ __typename {selection} }} }}"
        )
        answer = await reader.post("/mlflow/graphql", json={"query": query, "variables": {"data": data}})
        return answer.json()["data"][field]

    run = await ask(
        "mlflowGetRun", "run { info { runUuid } modelVersions { name } }", {"runId": context.mlflow_run_id}
    )
    assert run["run"]["info"]["runUuid"] == context.mlflow_run_id
    data = {"experimentIds": [experiment], "maxResults": 50_000}
    assert len((await ask("mlflowSearchRuns", "runs { info { runUuid } }", data))["runs"]) == 1
    data = {
        "runIds": [context.mlflow_run_id, other.mlflow_run_id],
        "metricKey": "accuracy",
        "maxResults": 320,
    }
    assert len((await ask("mlflowGetMetricHistoryBulkInterval", "metrics { step }", data))["metrics"]) == 6


async def parts(size, part=500_000):
    """Yield a body without a declared length."""
    for _ in range(size // part):
        yield b"x" * part


@pytest.mark.parametrize("body", [bytes, parts])
async def test_uploads_of_an_attempt_are_bounded_in_bytes(start_job, connect, reader, monkeypatch, body):
    monkeypatch.setattr(mlflow_proxy, "COUNTED_BYTES", 500_000)
    context = await start_job()
    experiment = await experiment_of(reader, context.mlflow_run_id)
    path = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{context.mlflow_run_id}/artifacts/"
    async with connect(context.mlflow_token) as attempt:
        too_large = await attempt.put(f"{path}large", content=body(5_000_000))
        statuses = [(await attempt.put(f"{path}{n}", content=body(2_500_000))).status_code for n in range(4)]
        assert too_large.status_code == 413
        # Without a declared length the bytes of the rejected file were uploaded too.
        assert statuses == ([200, 200, 200, 413] if body is bytes else [200, 200, 413, 413])
        metric = {"metrics": [{"key": "accuracy", "value": 1.0, "timestamp": 1, "step": 1}]}
        assert (await attempt.post(f"/mlflow{API}/runs/log-batch", json=metric)).status_code == 200
    listed = await reader.get(f"/mlflow{API}/artifacts/list", params={"run_id": context.mlflow_run_id})
    kept = [str(n) for n, status in enumerate(statuses) if status == 200]
    assert [(file["path"], file["file_size"]) for file in listed.json()["files"]] == [
        (n, 2_500_000) for n in kept
    ]


async def test_small_files_count_towards_the_upload_limit(start_job, connect, reader):
    context = await start_job()
    experiment = await experiment_of(reader, context.mlflow_run_id)
    path = f"/mlflow/api/2.0/mlflow-artifacts/artifacts/{experiment}/{context.mlflow_run_id}/artifacts/"
    async with connect(context.mlflow_token) as attempt:
        statuses = [(await attempt.put(f"{path}{n}", content=b"x")).status_code for n in range(11)]
    assert statuses == [200] * 9 + [413] * 2


async def test_datasets_and_models_count_as_uploads(start_job, connect):
    """Each may be as long as a body, and is a row in MLflow's database."""
    context = await start_job()
    dataset = {"name": "a", "source_type": "http", "source": "{}", "schema": "x" * 500_000}
    inputs = [{"datasets": [{"dataset": dataset | {"digest": str(n)}}]} for n in range(11)]
    async with connect(context.mlflow_token) as attempt:
        answers = [await attempt.post(f"/mlflow{API}/runs/log-inputs", json=content) for content in inputs]
        made = await attempt.post(f"/mlflow{API}/logged-models", json={"name": "a"})
    assert [answer.status_code for answer in answers] == [200] * 9 + [413] * 2
    assert made.status_code == 413


async def test_a_partial_upload_is_not_stored(stack, start_job, reader):
    context = await start_job()
    experiment = await experiment_of(reader, context.mlflow_run_id)
    url, secret = stack.mlflow
    path = f"/api/2.0/mlflow-artifacts/artifacts/{experiment}/{context.mlflow_run_id}/artifacts/"

    async def broken():
        yield b"x" * 100_000
        raise ConnectionError("broken off")

    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {secret}"}) as mlflow:
        for headers in ({}, {"Content-Length": "200000"}):
            with pytest.raises(ConnectionError):
                await mlflow.put(f"{path}half", content=broken(), headers=headers)
        assert (await mlflow.put(f"{path}whole", content=b"x")).is_success
    listed = await reader.get(f"/mlflow{API}/artifacts/list", params={"run_id": context.mlflow_run_id})
    assert [file["path"] for file in listed.json()["files"]] == ["whole"]


async def endless():
    while True:
        yield b"x"
        await asyncio.sleep(0.05)


async def never(*_, **__):
    await asyncio.Event().wait()


async def answer_without_end(*_, **__):
    return httpx.Response(200, content=endless())


@pytest.mark.parametrize(("send", "status"), [(never, 503), (answer_without_end, 200)])
async def test_a_read_has_a_time_limit(app, reader, monkeypatch, send, status):
    monkeypatch.setattr(mlflow_proxy, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(app.state.components.mlflow_http, "send", send)
    for _ in range(2):  # as many as the limit of concurrent reads, so that none keeps its slot
        asked = [reader.get("/mlflow/version") for _ in range(mlflow_proxy.MAX_READS)]
        async with asyncio.timeout(10):
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {status}
