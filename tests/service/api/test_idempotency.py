import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from service.store.database import Database
from service.store.webhooks import MAX_WEBHOOKS_PER_OWNER
from tests.service.api.conftest import ON_BOTH_DATABASES

pytestmark = ON_BOTH_DATABASES
BODY = {"name": "mine", "spec": {"steps": 10, "num_workers": 2}}
KEY = {"Idempotency-Key": "5f1b7c1e-0d57-4c0a"}


async def count(client):
    return len((await client.get("/v1/jobs")).json()["jobs"])


async def test_a_repeated_request_is_executed_once_with_the_same_response(client):
    first = await client.post("/v1/jobs", json=BODY, headers=KEY)
    again = await client.post("/v1/jobs", json=BODY, headers=KEY)
    assert first.status_code == again.status_code == 202
    assert first.content == again.content
    assert first.headers["Location"] == again.headers["Location"]
    assert first.headers["content-type"] == again.headers["content-type"]
    assert (first.headers.get("Idempotency-Replayed"), again.headers["Idempotency-Replayed"]) == (
        None,
        "true",
    )
    assert await count(client) == 1
    await client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "another"})
    await client.post("/v1/jobs", json=BODY)
    await client.post("/v1/jobs", json=BODY)
    assert await count(client) == 4


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/jobs", BODY | {"name": "other"}), ("/v1/comparisons", BODY), ("/v1/jobs?x=1", BODY)],
)
async def test_reusing_a_key_for_another_request_is_rejected(client, path, body):
    await client.post("/v1/jobs", json=BODY, headers=KEY)
    refused = await client.post(path, json=body, headers=KEY)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert await count(client) == 1


@pytest.mark.parametrize("key", [b"", b"a b", b"x" * 256, "ü".encode(), b"\t"])
async def test_an_invalid_key_is_rejected(client, key):
    refused = await client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": key})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert await count(client) == 0


async def test_a_key_can_be_reused_after_an_error(client):
    refused = await client.post("/v1/jobs", json=BODY | {"spec": {"steps": 0}}, headers=KEY)
    assert refused.status_code == 422
    assert (await client.post("/v1/jobs", json=BODY, headers=KEY)).status_code == 202


async def test_an_error_rolls_back_what_the_request_stored(app, client, monkeypatch):
    monkeypatch.setattr(app.state.components.idempotency, "store", None)
    with pytest.raises(TypeError):
        await client.post("/v1/jobs", json=BODY, headers=KEY)
    monkeypatch.undo()
    assert await count(client) == 0
    assert (await client.post("/v1/jobs", json=BODY, headers=KEY)).status_code == 202
    assert await count(client) == 1


async def test_requests_with_a_key_in_flight_get_retry_after(client):
    answers = await asyncio.gather(*[client.post("/v1/jobs", json=BODY, headers=KEY) for _ in range(8)])
    waits = [answer for answer in answers if answer.status_code == 409]
    done = [answer for answer in answers if answer.status_code == 202]
    assert len(waits) + len(done) == 8
    assert waits
    assert all(answer.headers["Retry-After"] == "1" for answer in waits)
    assert len({answer.content for answer in done}) == 1
    assert await count(client) == 1


async def test_keys_are_per_owner(client, as_owner):
    ann, bob = await as_owner("ann"), await as_owner("bob")
    for caller in (ann, bob, client):
        answer = await caller.post("/v1/jobs", json=BODY, headers=KEY)
        assert (answer.status_code, answer.headers.get("Idempotency-Replayed")) == (202, None)
    assert await count(client) == 3


async def test_a_token_of_smaller_scope_does_not_get_the_stored_response(as_owner):
    ann, reader = await as_owner("ann"), await as_owner("ann", "read")
    await ann.post("/v1/jobs", json=BODY, headers=KEY)
    assert (await reader.post("/v1/jobs", json=BODY, headers=KEY)).status_code == 422
    assert (await reader.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "new"})).status_code == 403


async def test_the_dispatcher_wakes_after_the_commit(app, client, database_url, monkeypatch):
    seen = []

    async def look():
        other = Database(database_url, 10)
        async with other.read() as connection:
            found = (await connection.execute(text("SELECT cancel_requested FROM jobs"))).scalars().all()
        await other.close()
        return [bool(requested) for requested in found]

    def wake():
        with ThreadPoolExecutor() as pool:
            seen.append(pool.submit(asyncio.run, look()).result())

    monkeypatch.setattr(app.state.components.dispatcher, "wake", wake)
    job = (await client.post("/v1/jobs", json=BODY, headers=KEY)).json()
    assert seen == [[False]]
    await client.post(f"/v1/jobs/{job['id']}:cancel", headers={"Idempotency-Key": "c"})
    assert seen == [[False], [True]]
    await client.post("/v1/jobs", json=BODY, headers=KEY)
    assert len(seen) == 2


async def test_a_repeated_cancel_is_one_event(client):
    job = (await client.post("/v1/jobs", json=BODY)).json()
    first, again = [await client.post(f"/v1/jobs/{job['id']}:cancel", headers=KEY) for _ in range(2)]
    assert first.content == again.content
    events = (await client.get(f"/v1/jobs/{job['id']}/events")).json()["events"]
    assert [event["reason"] for event in events].count("cancellation requested") == 1


@pytest.mark.parametrize("what", ["outgoing.check", "secrets.resolve"])
async def test_slow_upstream_calls_do_not_delay_other_requests(app, client, monkeypatch, what):
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(*_):
        asked.set()
        await answer.wait()
        return {}

    part, name = what.split(".")
    first = {"outgoing": ("/v1/webhooks", {"url": "https://93.184.215.14/"}), "secrets": ("/v1/jobs", BODY)}[
        part
    ]
    with monkeypatch.context() as patched:
        components = app.state.components
        target = components.checks.secrets if part == "secrets" else components.outgoing
        patched.setattr(target, name, slow)
        waiting = asyncio.create_task(client.post(first[0], json=first[1], headers=KEY))
        await asyncio.wait_for(asked.wait(), 5)
    async with asyncio.timeout(5):
        other = await client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "another"})
    assert (other.status_code, waiting.done()) == (202, False)
    answer.set()
    assert (await waiting).status_code in (201, 202)


async def test_a_repetition_gets_the_stored_response_even_if_it_would_now_be_rejected(
    app, client, monkeypatch
):
    body = {"url": "https://93.184.215.14/"}
    first = await client.post("/v1/webhooks", json=body, headers=KEY)
    monkeypatch.setattr(app.state.components.outgoing, "check", None)
    again = await client.post("/v1/webhooks", json=body, headers=KEY)
    assert (again.status_code, again.content) == (201, first.content)


def take_too_early(app, monkeypatch):
    """Insert a key before the next request stores its response, like another replica that commits first."""
    take, is_early = app.state.components.idempotency.take, [True]

    async def too_early(*arguments):
        return None if is_early and is_early.pop() else await take(*arguments)

    monkeypatch.setattr(app.state.components.idempotency, "take", too_early)


async def test_the_second_request_with_a_key_gets_the_first_response(app, client, monkeypatch):
    first = await client.post("/v1/jobs", json=BODY, headers=KEY)
    take_too_early(app, monkeypatch)
    again = await client.post("/v1/jobs", json=BODY, headers=KEY)
    assert (again.status_code, again.content, again.headers["Idempotency-Replayed"]) == (
        202,
        first.content,
        "true",
    )
    assert await count(client) == 1


async def test_the_second_request_gets_no_error_caused_by_the_first(app, client, monkeypatch):
    body = {"url": "https://93.184.215.14/"}
    for _ in range(MAX_WEBHOOKS_PER_OWNER - 1):
        await client.post("/v1/webhooks", json=body)
    first = await client.post("/v1/webhooks", json=body, headers=KEY)
    assert first.status_code == 201
    take_too_early(app, monkeypatch)
    again = await client.post("/v1/webhooks", json=body, headers=KEY)
    assert (again.status_code, again.content, again.headers["Idempotency-Replayed"]) == (
        201,
        first.content,
        "true",
    )
    assert (
        await client.post("/v1/webhooks", json=body, headers={"Idempotency-Key": "another"})
    ).status_code == 409
