import asyncio
import json

import pytest
from standardwebhooks import Webhook as Checker

from service.api.app import make_app
from service.settings import Settings
from tests.service.api.conftest import ON_BOTH_DATABASES
from tests.service.api.routes.test_jobs import SPEC
from tests.service.receiver import receiving

HOOK = {
    "url": "https://93.184.215.14/hook",
    "thresholds": [{"metric": "accuracy", "relation": "at_least", "bound": 0.9}],
}


@ON_BOTH_DATABASES
async def test_a_webhook_is_created_shown_and_deleted_by_its_owner(client, as_owner):
    ann, bob = await as_owner("ann"), await as_owner("bob")
    made = await ann.post("/v1/webhooks", json=HOOK)
    assert made.status_code == 201
    hook, secret = made.json()["id"], made.json()["secret"]
    assert secret.startswith("whsec_")
    assert made.json()["states"] == ["succeeded", "failed", "cancelled"]
    shown = await ann.get(f"/v1/webhooks/{hook}")
    assert "secret" not in shown.json()
    assert (await ann.get("/v1/webhooks")).json()["webhooks"] == [shown.json()]
    assert (await client.get("/v1/webhooks")).json()["webhooks"] == [shown.json()]
    assert (await bob.get("/v1/webhooks")).json()["webhooks"] == []
    for answer in (
        await bob.get(f"/v1/webhooks/{hook}"),
        await bob.delete(f"/v1/webhooks/{hook}"),
        await bob.get(f"/v1/webhooks/{hook}/deliveries"),
    ):
        assert answer.status_code == 404
    assert (await ann.delete(f"/v1/webhooks/{hook}")).status_code == 204
    assert (await ann.get(f"/v1/webhooks/{hook}")).status_code == 404
    records = (await client.get("/v1/audit")).json()["records"][:2]
    assert [(record["action"], record["detail"]) for record in records] == [
        ("webhook.delete", "to https://93.184.215.14"),  # the path may be a secret
        ("webhook.create", "to https://93.184.215.14"),
    ]


async def test_a_read_token_cannot_create_webhooks(as_owner):
    reader = await as_owner("ann", "read")
    assert (await reader.post("/v1/webhooks", json=HOOK)).status_code == 403


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "ftp://93.184.215.14/"}, "url"),
        ({"url": "nonsense"}, "url"),
        ({"states": ["running"]}, "states"),
        ({"thresholds": [{"metric": "accuracy", "relation": "above", "bound": 1}]}, "thresholds[0].relation"),
        ({"thresholds": [{"metric": "", "relation": "at_least", "bound": 1}]}, "thresholds[0].metric"),
        ({"tag": "two words"}, "tag"),
    ],
)
async def test_invalid_values_are_named(client, changes, field):
    answer = await client.post("/v1/webhooks", json=HOOK | changes)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


@ON_BOTH_DATABASES
async def test_the_end_of_a_cancelled_job_is_posted(tmp_path, monkeypatch, database_url, ray, mlflow):
    import httpx

    monkeypatch.setattr("service.domain.webhooks.PAUSES_SECONDS", (0.1,))
    settings = Settings(
        token="0123456789abcdef-test",
        database_url=database_url,
        storage=tmp_path,
        poll_seconds=0.02,
        webhook_networks="127.0.0.0/8",
    )
    app = make_app(settings, ray, mlflow)
    headers = {"Authorization": "Bearer 0123456789abcdef-test"}
    with receiving() as receiver:
        receiver.statuses = [500]
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://test", headers=headers
            ) as client,
        ):
            secret = (await client.post("/v1/webhooks", json={"url": receiver.url})).json()["secret"]
            job = (await client.post("/v1/jobs", json={"name": "mine", "spec": SPEC})).json()["id"]
            await client.post(f"/v1/jobs/{job}:cancel")
            async with asyncio.timeout(20):
                while len(receiver.messages) < 2:
                    await asyncio.sleep(0.05)
    (first, body), (second, again) = receiver.messages
    assert first["webhook-id"] == second["webhook-id"]
    assert body == again
    assert Checker(secret).verify(body, second)["type"] == "job.cancelled"
    assert json.loads(body)["data"]["job_id"] == job
