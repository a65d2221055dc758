"""The OpenAPI document is complete, correct, and equal to the committed one."""

import json
import os
from contextlib import AsyncExitStack
from pathlib import Path
from unittest.mock import patch

import httpx
import jsonschema_rs
import pytest

from service.api.app import make_app
from service.settings import Settings
from tests.contract.service import TOKEN, AcceptingWebhooks, QuickRay
from tests.fakes import FakeMlflow

COMMITTED = Path(__file__).parent.parent.parent / "docs" / "openapi.json"
PROBLEM = {"$ref": "#/components/schemas/Problem"}


@pytest.fixture
async def client(tmp_path):
    settings = Settings(
        token=TOKEN,
        database_url=f"sqlite+aiosqlite:///{tmp_path}/test.db",
        storage=tmp_path / "storage",
        poll_seconds=0.02,
        outcome_grace_seconds=0,
    )
    app = make_app(settings, QuickRay(), FakeMlflow())
    async with AsyncExitStack() as stack:
        with patch("service.wiring.WebhookHttp", AcceptingWebhooks):
            await stack.enter_async_context(app.router.lifespan_context(app))
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://test",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        yield await stack.enter_async_context(client)


def operations(document):
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def success_of(operation):
    return next(answer for status, answer in operation["responses"].items() if status.startswith("2"))


def test_the_committed_document_is_current(document):
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("UPDATE") == "openapi":
        COMMITTED.write_text(text)
    assert COMMITTED.read_text() == text, (
        "the API's document has changed: `make openapi`, and commit docs/openapi.json"
    )


def test_every_operation_is_described(document):
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names) > 20
    for method, path, operation in operations(document):
        assert {"summary", "description", "tags"} <= operation.keys(), path
        errors = {
            status: answer
            for status, answer in operation["responses"].items()
            if status[0] in "45" and path != "/readyz"
        }
        assert all(list(answer["content"]) == ["application/problem+json"] for answer in errors.values()), (
            path
        )
        assert all(
            answer["content"]["application/problem+json"]["schema"] == PROBLEM for answer in errors.values()
        ), path
        if path.startswith("/v1"):
            assert {"401", "403", "429", "500", "503"} <= errors.keys(), path
            assert ("404" in errors) == ("{" in path), path
            if method == "post":
                assert {"400", "413", "422"} <= errors.keys(), path


def test_response_examples_are_valid(document):
    found = 0
    for _, path, operation in operations(document):
        for status, answer in operation["responses"].items():
            for media_type, content in answer.get("content", {}).items():
                if not media_type.endswith("json"):
                    continue
                if "example" not in content:
                    assert operation["operationId"] in ("live", "ready"), (path, status)
                    continue
                schema = content["schema"] | {"components": document["components"]}
                jsonschema_rs.validator_for(schema).validate(content["example"])
                found += 1
                if media_type == "application/problem+json":
                    assert content["example"]["status"] == int(status)
    assert found > 100


async def test_request_examples_are_accepted(document, client):
    ended = await ended_job(client)
    sent = 0
    for method, path, operation in operations(document):
        if "requestBody" not in operation:
            continue
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        assert examples, path
        for example in examples.values():
            answer = await client.request(method, path.format(job_id=ended), json=example["value"])
            assert str(answer.status_code) in operation["responses"], answer.text
            assert answer.is_success, (path, answer.text)
            sent += 1
    assert sent >= 10


async def ended_job(client):
    """Submit a job and wait for its end."""
    job_id = (await client.post("/v1/jobs", json={"name": "ended", "spec": {"steps": 10}})).json()["id"]
    events = await client.get(f"/v1/jobs/{job_id}/events", params={"follow": "true"})
    assert "event: end" in events.text
    return job_id


async def test_every_link_can_be_followed(document, client):
    by_name = {
        operation["operationId"]: (method, path, operation)
        for method, path, operation in operations(document)
    }
    ended = await ended_job(client)
    comparison = (await client.post("/v1/comparisons", json=body_of(by_name["submit_comparison"][2]))).json()[
        "id"
    ]
    for name in ("make_token", "make_token", "make_webhook", "make_webhook"):
        await client.post(by_name[name][1], json=body_of(by_name[name][2]))
    webhook = (await client.get("/v1/webhooks")).json()["webhooks"][0]["id"]
    followed = 0
    for method, path, operation in operations(document):
        if not (links := success_of(operation).get("links", {})):
            continue
        fresh = (await client.post("/v1/jobs", json=body_of(by_name["submit_job"][2]))).json()["id"]
        job_id = fresh if operation["operationId"] in ("cancel_job", "pause_job") else ended
        query = {"page_size": 1} if "next_page_token" in str(links) else {}
        source = path.format(job_id=job_id, comparison_id=comparison, webhook_id=webhook)
        answer = await client.request(method, source, params=query, json=body_of(operation))
        assert answer.is_success, (path, answer.text)
        for link in links.values():
            target_method, target, target_operation = by_name[link["operationId"]]
            values = {
                name: find(answer.json(), expression) for name, expression in link["parameters"].items()
            }
            assert values.keys() <= {parameter["name"] for parameter in target_operation["parameters"]}, (
                path,
                link,
            )
            query = {name: value for name, value in values.items() if f"{{{name}}}" not in target}
            reached = await client.request(
                target_method, target.format(**values), params=query, json=body_of(target_operation)
            )
            # An ended job cannot be cancelled, and an active one not resumed; but the operations exist.
            assert reached.status_code in (200, 202, 204, 409), (path, link, reached.text)
            followed += 1
    assert followed > 30


def body_of(operation):
    if "requestBody" not in operation:
        return None
    return next(iter(operation["requestBody"]["content"]["application/json"]["examples"].values()))["value"]


def find(answer, expression):
    """Resolve the runtime expression of a link."""
    found = answer
    for part in expression.removeprefix("$response.body#/").split("/"):
        found = found[int(part) if part.isdigit() else part]
    return found
