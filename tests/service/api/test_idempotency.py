import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from service.store.database import Database
from service.store.webhooks import MOST_OF_AN_OWNER
from tests.service.api.conftest import ON_BOTH_DATABASES

pytestmark = ON_BOTH_DATABASES
BODY = {"name": "mine", "spec": {"steps": 10, "num_workers": 2}}
KEY = {"Idempotency-Key": "5f1b7c1e-0d57-4c0a"}


async def count(client):
    return len((await client.get("/v1/jobs")).json()["jobs"])


async def test_a_repeated_request_is_done_once_and_answered_alike(client):
    first = await client.post("/v1/jobs", json=BODY, headers=KEY)
    again = await client.post("/v1/jobs", json=BODY, headers=KEY)
    assert first.status_code == again.status_code == 202
    assert first.content == again.content
    assert first.headers["Location"] == again.headers["Location"]
    assert first.headers["content-type"] == again.headers["content-type"]
    assert (first.headers.get("Idempotency-Replayed"), again.headers["Idempotency-Replayed"]) == (None, "true")
    assert await count(client) == 1
    await client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "another"})
    await client.post("/v1/jobs", json=BODY)
    await client.post("/v1/jobs", json=BODY)
    assert await count(client) == 4


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/jobs", BODY | {"name": "other"}), ("/v1/comparisons", BODY), ("/v1/jobs?x=1", BODY)]
)
async def test_another_request_under_the_same_key_is_refused(client, path, body):
    await client.post("/v1/jobs", json=BODY, headers=KEY)
    refused = await client.post(path, json=body, headers=KEY)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert await count(client) == 1


@pytest.mark.parametrize("key", [b"", b"a b", b"x" * 256, "ü".encode(), b"\t"])
async def test_a_key_that_is_none_is_refused(client, key):
    refused = await client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": key})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert await count(client) == 0


async def test_a_key_is_free_again_after_an_error(client):
    refused = await client.post("/v1/jobs", json=BODY | {"spec": {"steps": 0}}, headers=KEY)
    assert refused.status_code == 422
    assert (await client.post("/v1/jobs", json=BODY, headers=KEY)).status_code == 202


async def test_an_error_after_something_was_stored_leaves_nothing(app, client, monkeypatch):
    monkeypatch.setattr(app.state.components.idempotency, "store", None)
    with pytest.raises(TypeError):
        await client.post("/v1/jobs", json=BODY, headers=KEY)
    monkeypatch.undo()
    assert await count(client) == 0
    assert (await client.post("/v1/jobs", json=BODY, headers=KEY)).status_code == 202
    assert await count(client) == 1


async def test_while_the_first_is_in_flight_others_are_told_to_wait(client):
    answers = await asyncio.gather(*[client.post("/v1/jobs", json=BODY, headers=KEY) for _ in range(8)])
    waits = [answer for answer in answers if answer.status_code == 409]
    done = [answer for answer in answers if answer.status_code == 202]
    assert len(waits) + len(done) == 8
    assert waits
    assert all(answer.headers["Retry-After"] == "1" for answer in waits)
    assert len({answer.content for answer in done}) == 1
    assert await count(client) == 1


async def test_each_owner_has_keys_of_their_own(client, as_owner):
    ann, bob = await as_owner("ann"), await as_owner("bob")
    for caller in (ann, bob, client):
        answer = await caller.post("/v1/jobs", json=BODY, headers=KEY)
        assert (answer.status_code, answer.headers.get("Idempotency-Replayed")) == (202, None)
    assert await count(client) == 3


async def test_a_token_of_smaller_scope_is_not_handed_the_answer(as_owner):
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
    assert [event["reason"] for event in events].count("asked to cancel") == 1


@pytest.mark.parametrize("what", ["outgoing.check", "secrets.resolve"])
async def test_what_is_asked_of_others_keeps_no_other_request_waiting(app, client, monkeypatch, what):
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(*_):
        asked.set()
        await answer.wait()
        return {}

    part, name = what.split(".")
    first = {"outgoing": ("/v1/webhooks", {"url": "https://93.184.215.14/"}), "secrets": ("/v1/jobs", BODY)}[part]
    with monkeypatch.context() as patched:
        patched.setattr(getattr(app.state.components, part), name, slow)
        waiting = asyncio.create_task(client.post(first[0], json=first[1], headers=KEY))
        await asyncio.wait_for(asked.wait(), 5)
    async with asyncio.timeout(5):
        other = await client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "another"})
    assert (other.status_code, waiting.done()) == (202, False)
    answer.set()
    assert (await waiting).status_code in (201, 202)


async def test_a_repetition_is_answered_though_others_would_refuse_it_now(app, client, monkeypatch):
    body = {"url": "https://93.184.215.14/"}
    first = await client.post("/v1/webhooks", json=body, headers=KEY)
    monkeypatch.setattr(app.state.components.outgoing, "check", None)
    again = await client.post("/v1/webhooks", json=body, headers=KEY)
    assert (again.status_code, again.content) == (201, first.content)


def take_too_early(app, monkeypatch):
    """Let the next request take a key before there is an answer, as on another replica just before the first's commit."""
    take, is_early = app.state.components.idempotency.take, [True]

    async def too_early(*arguments):
        return None if is_early and is_early.pop() else await take(*arguments)

    monkeypatch.setattr(app.state.components.idempotency, "take", too_early)


async def test_who_comes_to_a_key_second_gets_the_firsts_answer(app, client, monkeypatch):
    first = await client.post("/v1/jobs", json=BODY, headers=KEY)
    take_too_early(app, monkeypatch)
    again = await client.post("/v1/jobs", json=BODY, headers=KEY)
    assert (again.status_code, again.content, again.headers["Idempotency-Replayed"]) == (202, first.content, "true")
    assert await count(client) == 1


async def test_who_comes_second_gets_no_error_for_what_the_first_has_done(app, client, monkeypatch):
    body = {"url": "https://93.184.215.14/"}
    for _ in range(MOST_OF_AN_OWNER - 1):
        await client.post("/v1/webhooks", json=body)
    first = await client.post("/v1/webhooks", json=body, headers=KEY)
    assert first.status_code == 201
    take_too_early(app, monkeypatch)
    again = await client.post("/v1/webhooks", json=body, headers=KEY)
    assert (again.status_code, again.content, again.headers["Idempotency-Replayed"]) == (201, first.content, "true")
    assert (await client.post("/v1/webhooks", json=body, headers={"Idempotency-Key": "another"})).status_code == 409
