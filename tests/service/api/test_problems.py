"""Client errors are 4xx problem details that name the field and the value."""

import json

import pytest

BODY = '{"name": "mine", "spec": {"steps": 10}}'
JSON = {"Content-Type": "application/json"}
NUL, HALF_A_PAIR = "\x00", "\\ud800"


async def refused(client, status, method, path, **request):
    answer = await client.request(method, path, **request)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), (
        answer.text
    )
    assert answer.json()["status"] == status
    return answer


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", "GET, POST"),
        ("DELETE", "/v1/jobs/job-0", "GET"),
        ("GET", "/v1/jobs/job-0:cancel", "POST"),
        ("OPTIONS", "/v1/tokens", "GET, POST"),
    ],
)
async def test_a_method_that_is_not_allowed(client, method, path, allowed):
    answer = await refused(client, 405, method, path)
    assert answer.headers["Allow"] == allowed
    assert answer.json()["detail"] == f"method: must be {allowed} for {path} (got {method})"


async def test_an_unknown_path(client):
    for path in ("/nothing", "/v1/nothing", "/v1/jobs/job-0:explode", "/v1/jobs/a/b/c"):
        assert (await refused(client, 404, "GET", path)).json()["detail"] == f"there is nothing at {path}"


@pytest.mark.parametrize(
    ("status", "content", "headers", "field"),
    [
        (400, b'{"name": "\xff"}', JSON, "body"),
        (400, f'{{"name": {"[" * 3_000}}}'.encode(), JSON, "body"),
        (400, f'{{"name": 1{"0" * 5_000}}}'.encode(), JSON, "body"),
        (415, BODY.encode(), {"Content-Type": "text/plain"}, "Content-Type"),
        (415, b"name=mine", {"Content-Type": "application/x-www-form-urlencoded"}, "Content-Type"),
        (422, b'{"name":', JSON, "body"),
        (422, b"", JSON, "body"),
        (422, b"[]", JSON, "body"),
    ],
)
async def test_a_body_that_is_not_a_json_object(client, status, content, headers, field):
    for path in ("/v1/jobs", "/v1/jobs:validate"):
        answer = await refused(client, status, "POST", path, content=content, headers=headers)
        assert answer.json()["errors"][0]["field"] == field
        assert field in answer.json()["detail"]


async def _in_pieces():
    for _ in range(20):
        yield b"x" * 100_000


@pytest.mark.parametrize("content", [b"x" * 2_000_000, _in_pieces])
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "x"}])
async def test_a_body_that_is_too_large(client, content, headers):
    content = content() if callable(content) else content
    answer = await refused(client, 413, "POST", "/v1/jobs", content=content, headers=JSON | headers)
    assert answer.json()["detail"] == "the body must have at most 256,000 bytes"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/jobs", '{"name": %s, "spec": {"steps": 10}}', "name"),
        ("/v1/jobs", '{"name": "mine", "spec": {"steps": %s}}', "spec.steps"),
        ("/v1/jobs", '{"name": "mine", "tags": [%s], "spec": {"steps": 1}}', "tags[0]"),
        ("/v1/jobs", '{"name": "mine", "secrets": {"A": %s}, "spec": {"steps": 1}}', "secrets.A"),
        ("/v1/tokens", '{"owner": %s, "scopes": ["read"]}', "owner"),
        (
            "/v1/comparisons",
            '{"name": "mine", "spec": {"steps": 10}, "matrix": {"optimizer.lr": [%s]}}',
            "matrix.optimizer.lr[0]",
        ),
    ],
)
async def test_an_invalid_value(client, path, body, field):
    for value in (f'"{HALF_A_PAIR}"', '"\\u0000"', "NaN", "1e999", "1" + "0" * 400, "[" * 99 + "]" * 99):
        answer = await refused(client, 422, "POST", path, content=body % value, headers=JSON)
        assert answer.json()["errors"][0]["field"].startswith(field)
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_an_invalid_filter(client):
    for field in ("owner", "state", "comparison", "norm", "tag", "page_token", "page_size"):
        for value in (NUL, "\ufffd", "!" * 5_000):
            answer = await refused(client, 422, "GET", "/v1/jobs", params={field: value})
            assert answer.json()["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("method", "path", "header", "value", "status"),
    [
        ("GET", "/events", "Last-Event-ID", "x", 422),
        ("GET", "/events", "Last-Event-ID", "9999999999", 422),
        ("GET", "/logs", "Last-Event-ID", "99999999", 422),
        ("GET", "/logs", "Last-Event-ID", "\u0661:0", 422),
        ("POST", ":cancel", "If-Match", "9" * 300, 422),
        ("POST", ":cancel", "If-Match", "x", 412),
        ("POST", ":cancel", "Idempotency-Key", "a b", 422),
    ],
)
async def test_an_invalid_header(client, method, path, header, value, status):
    job = (await client.post("/v1/jobs", content=BODY, headers=JSON)).json()
    answer = await refused(
        client, status, method, f"/v1/jobs/{job['id']}{path}", headers={header: value.encode()}
    )
    if status == 422:
        assert answer.json()["errors"][0]["field"] == header


@pytest.mark.parametrize(
    "value", [f'"{HALF_A_PAIR}"', f'{{"{HALF_A_PAIR}": 1}}', '["\\u0000"]', "[" * 240 + "]" * 240]
)
async def test_an_argument_that_cannot_be_stored(client, value):
    body = (
        f'"spec": {{"steps": 10, "model": {{"name": "torchvision:resnet18", "arguments": {{"a": {value}}}}}}}'
    )
    answer = await refused(
        client, 422, "POST", "/v1/jobs", content=f'{{"name": "mine", {body}}}', headers=JSON
    )
    assert answer.json()["errors"][0]["field"] == "spec.model.arguments"
    job = (await client.post("/v1/jobs", content=BODY, headers=JSON)).json()
    overrides = (
        f'{{"overrides": {{"model": {{"name": "torchvision:resnet18", "arguments": {{"a": {value}}}}}}}}}'
    )
    await refused(client, 422, "POST", f"/v1/jobs/{job['id']}:clone", content=overrides, headers=JSON)
    assert len((await client.get("/v1/jobs")).json()["jobs"]) == 1


async def test_the_size_of_a_comparison_is_limited(client):
    body = {"name": "mine", "spec": {"steps": 10}, "matrix": {f"a{number}": [1] for number in range(5_000)}}
    answer = await refused(client, 422, "POST", "/v1/comparisons:validate", json=body)
    assert answer.json()["errors"][0]["field"] == "matrix"


@pytest.mark.parametrize(
    ("path", "known"),
    [
        (
            "/v1/jobs?stat=running",
            "must be one of comparison, norm, owner, page_size, page_token, state, tag",
        ),
        ("/v1/jobs?State=running&state=running", "must be one of comparison"),
        ("/v1/me?x=1", "this call has none"),
        ("/v1/cluster?%00=1", "this call has none"),
    ],
)
async def test_an_unknown_query_parameter(client, path, known):
    answer = await refused(client, 422, "GET", path)
    (error,) = answer.json()["errors"]
    assert error["field"].startswith("query parameter ")
    assert error["message"].startswith(known)


async def test_many_invalid_fields_are_counted_and_the_first_ones_named(client):
    body = {"name": "x", "spec": {"steps": 1}} | {f"field{number}": 1 for number in range(1_000)}
    answer = await refused(client, 422, "POST", "/v1/jobs", json=body)
    assert len(answer.json()["errors"]) == 20
    assert "; and 980 more" in answer.json()["detail"]


async def test_a_rejected_value_is_truncated_in_the_error(client):
    body = {"name": "x", "spec": {"steps": 1}, "matrix": {"model.hidden": [["x" * 3_000]]}}
    answer = await refused(client, 422, "POST", "/v1/comparisons", json=body)
    assert len(answer.text) < 2_000


@pytest.mark.parametrize(
    ("spec", "field", "rule"),
    [
        (
            {"arguments": {"a": "x" * 70_000}},
            "spec",
            "must have at most 65,536 bytes as JSON with all defaults",
        ),
        (
            {"arguments": {"a": [1] * 15_000}},
            "spec.model.timm.arguments",
            "must have at most 10,000 values in all",
        ),
        (
            {"arguments": {"a": [[[[]]]] * 4_000}},
            "spec.model.timm.arguments",
            "must have at most 10,000 values in all",
        ),
    ],
)
async def test_a_spec_that_is_too_large(client, spec, field, rule):
    body = {"name": "x", "spec": {"steps": 1, "model": {"name": "timm:resnet26"} | spec}}
    for path in ("/v1/jobs", "/v1/jobs:validate"):
        (error,) = (await refused(client, 422, "POST", path, json=body)).json()["errors"]
        assert (error["field"].replace(".timm", ""), error["message"]) == (field.replace(".timm", ""), rule)
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/v1/jobs", "/sign-in"]
)
async def test_head_answers_as_get_without_the_body(client, path):
    got, head = await client.get(path), await client.head(path)
    assert head.status_code == got.status_code
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.content == b""


async def test_head_of_a_stream_ends(client):
    job = (await client.post("/v1/jobs", json={"name": "x", "spec": {"steps": 10}})).json()
    head = await client.head(f"/v1/jobs/{job['id']}/events?follow=true")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    "spec",
    [
        {"model": {"name": "mlp", "hidden": [65_536] * 64}},
        {"model": {"name": "timm:x"}, "data": {"name": "synthetic", "shape": [65_536] * 4, "classes": 2}},
        {
            "data": {"name": "synthetic", "shape": [784], "classes": 2, "train_samples": 10**9},
            "global_batch_size": 10**9,
        },
    ],
)
async def test_a_job_larger_than_the_memory_of_every_node_is_rejected(client, ray, spec):
    ray.largest_node_bytes = 16_000_000_000
    bodies = {
        "/v1/jobs": {"name": "x", "spec": {"steps": 1} | spec},
        "/v1/comparisons": {"name": "x", "spec": {"steps": 1} | spec, "matrix": {"seed": [0, 1]}},
    }
    for path, body in bodies.items():
        for call in (path, f"{path}:validate"):
            (error,) = (await refused(client, 422, "POST", call, json=body)).json()["errors"]
            assert error["field"] == "spec"
            assert error["message"].startswith(
                "must fit into the memory of a node, 16.0 GB at most; weights, gradients, "
            )
    assert (await client.get("/v1/jobs")).json()["jobs"] == []
    ray.is_down = True  # the memory of nodes stays unknown
    assert (await client.post("/v1/jobs", json=bodies["/v1/jobs"])).status_code == 202


@pytest.mark.parametrize(
    ("model", "batch", "least"),
    [
        ({"name": "torchvision:resnet50"}, 4_096, "350.3"),  # of which 4,096 · 83.7 MB for backward
        ({"name": "cnn", "channels": [64]}, 4_096, "112.6"),  # of which 4,096 · 25.7 MB
    ],
)
async def test_a_batch_that_is_too_large_for_every_node_is_named(
    client, app, ray, monkeypatch, model, batch, least
):
    monkeypatch.setattr(app.state.components.checks.checker, "_timeout_seconds", 120)
    ray.largest_node_bytes = 16_000_000_000
    shape = {"name": "synthetic", "shape": [3, 224, 224], "train_samples": 8_192, "test_samples": 8}
    spec = {"steps": 1, "num_workers": 1, "model": model, "data": shape, "norm": "batch"}
    body = {"name": "x", "spec": spec | {"global_batch_size": batch}}
    for path in ("/v1/jobs", "/v1/jobs:validate"):
        (error,) = (await refused(client, 422, "POST", path, json=body)).json()["errors"]
        assert (error["field"], error["value"]) == ("spec.global_batch_size", batch)
        assert error["message"].startswith(
            "must fit into the memory of a node, 16.0 GB at most; weights, gradients, "
        )
        assert error["message"].endswith(f"take a worker at least {least} GB")
    assert (await client.get("/v1/jobs")).json()["jobs"] == []
    fitting = body | {"spec": spec | {"global_batch_size": 64}}
    assert (await client.post("/v1/jobs:validate", json=fitting)).status_code == 200


async def test_an_oversized_body_is_rejected_before_its_fields_are_checked(client):
    for steps in ([1] * 30_000, json.loads("[" * 200 + "]" * 200), [[[]]] * 12_000):
        answer = await client.post("/v1/jobs", json={"name": "x", "spec": {"steps": steps}})
        (error,) = answer.json()["errors"]
        is_large = len(steps) > 1
        assert (answer.status_code, error["field"]) == (422, "body" if is_large else "spec.steps")
        assert not is_large or error["message"] == "must have at most 20,000 values"
