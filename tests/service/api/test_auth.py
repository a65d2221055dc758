import asyncio
import re
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import text

from service.api.app import make_app
from service.domain.access import RateLimit
from service.settings import Settings
from tests.service.api.conftest import TOKEN

BODY = {"name": "mine", "spec": {"steps": 10, "num_workers": 2}}
COMPARISON = BODY | {"matrix": {"seed": [0, 1]}}
EXAMPLES = {
    "job_id": "job-0",
    "comparison_id": "comparison-0",
    "token_id": "token-0",
    "webhook_id": "webhook-0",
}
NEEDS_ADMIN = {
    ("post", "/v1/tokens"),
    ("get", "/v1/tokens"),
    ("post", "/v1/tokens/{token_id}:revoke"),
    ("get", "/v1/audit"),
}
POSTS_TO_READ = {"/v1/sign-in-links"}


async def operations(client):
    """Return every operation of the API's document with a URL and its required scope."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    found = [
        (method, path, operation)
        for path, by in paths.items()
        if path.startswith("/v1")
        for method, operation in by.items()
    ]
    assert len(found) > 10
    for method, path, operation in found:
        reads = method == "get" or path in POSTS_TO_READ
        scope = "admin" if (method, path) in NEEDS_ADMIN else "read" if reads else "submit"
        assert operation["security"] == [{"HTTPBearer": [scope]}], path
        yield method, path.format(**EXAMPLES), scope


HOLDERS = {
    "metrics": {"metrics", "admin"},
    "read": {"read", "submit", "admin"},
    "submit": {"submit", "admin"},
    "admin": {"admin"},
}
"""Scopes of a token that open what requires a scope."""


async def test_every_operation_needs_a_token_and_its_scope(app, client, other_anonymous, as_owner):
    app.state.components = replace(app.state.components, failures=RateLimit(1, 1_000))
    callers = {
        "metrics": await as_owner("prometheus", "metrics"),
        "read": await as_owner("ann", "read"),
        "submit": await as_owner("ann", "submit"),
        "admin": client,
    }
    async for method, path, scope in operations(client):
        for headers in ({}, {"Content-Type": "application/json"}):
            refused = await other_anonymous.request(
                method, path, headers=headers, content=b"{" if headers else None
            )
            assert refused.status_code == 401, path
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        for held, caller in callers.items():
            answer = await caller.request(method, path)
            if held in HOLDERS[scope]:
                assert answer.status_code in (200, 201, 404, 422), (path, held)
                continue
            assert answer.status_code == 403, (path, held)
            assert answer.headers["content-type"] == "application/problem+json"
            assert (
                answer.json()["detail"] == f"this call needs a token with scope {scope}; this one has {held}"
            )
            assert answer.headers["WWW-Authenticate"] == f'Bearer error="insufficient_scope", scope="{scope}"'


async def test_unknown_expired_and_revoked_tokens_get_the_same_response(client, other_anonymous):
    made = [
        (await client.post("/v1/tokens", json={"owner": "ann", "scopes": ["read"]} | more)).json()
        for more in ({"expires_in_seconds": 1}, {})
    ]
    headers = [{"Authorization": f"Bearer {token['token']}"} for token in made]
    assert [(await other_anonymous.get("/v1/me", headers=each)).status_code for each in headers] == [200, 200]
    await client.post(f"/v1/tokens/{made[1]['id']}:revoke")
    await asyncio.sleep(1)
    answers = [
        await other_anonymous.get("/v1/me", headers=each)
        for each in (*headers, {"Authorization": "Bearer no"}, {})
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert len({(answer.content, str(answer.headers)) for answer in answers}) == 1


async def test_owners_read_and_change_only_their_own_jobs(client, as_owner):
    ann, bob = await as_owner("ann"), await as_owner("bob")
    job = (await ann.post("/v1/jobs", json=BODY)).json()
    comparison = (await ann.post("/v1/comparisons", json=COMPARISON)).json()
    assert {job["owner"], comparison["owner"], comparison["jobs"][0]["owner"]} == {"ann"}
    unknown = (await bob.get("/v1/jobs/job-0")).json()["detail"]
    for method, path in [
        ("GET", f"/v1/jobs/{job['id']}"),
        ("GET", f"/v1/jobs/{job['id']}/events"),
        ("GET", f"/v1/jobs/{job['id']}/logs"),
        ("POST", f"/v1/jobs/{job['id']}:cancel"),
        ("GET", f"/v1/jobs/{comparison['jobs'][0]['id']}"),
        ("GET", f"/v1/comparisons/{comparison['id']}"),
        ("GET", f"/v1/comparisons/{comparison['id']}/report"),
        ("GET", f"/v1/comparisons/{comparison['id']}/curves"),
    ]:
        refused = await bob.request(method, path)
        assert refused.status_code == 404, path
        if path == f"/v1/jobs/{job['id']}":
            assert refused.json()["detail"] == unknown.replace("job-0", job["id"])
        for allowed in (ann, client):
            assert (await allowed.request(method, path)).status_code in (200, 202), path
    assert [len((await each.get("/v1/jobs")).json()["jobs"]) for each in (ann, bob, client)] == [3, 0, 3]


async def test_events_record_the_actor(client, as_owner):
    ann = await as_owner("ann")
    job = (await ann.post("/v1/jobs", json=BODY)).json()
    await client.post(f"/v1/jobs/{job['id']}:cancel")
    events = (await ann.get(f"/v1/jobs/{job['id']}/events")).json()["events"]
    actors = {event["reason"]: event["actor"] for event in events}
    assert (actors["submitted by the user"], actors["cancellation requested"]) == ("ann", "admin")


async def test_the_secret_of_a_token_is_shown_once_and_not_stored(client, app, tmp_path, caplog):
    answer = await client.post("/v1/tokens", json={"owner": "ann", "scopes": ["submit"], "name": "laptop"})
    made = answer.json()
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    secret = made.pop("token")
    assert re.fullmatch(r"syncbn_[A-Za-z0-9_-]{43}", secret)
    listed = await client.get("/v1/tokens")
    assert listed.json()["tokens"][0] == made
    audit = await client.get("/v1/audit")
    assert audit.json()["records"][0] | {"at": None} == {
        "at": None,
        "actor": "admin",
        "token_id": listed.json()["tokens"][1]["id"],
        "action": "token.create",
        "subject": made["id"],
        "detail": "of ann, with submit",
    }
    for path in tmp_path.glob("test.db*"):
        assert secret.encode() not in path.read_bytes()
    assert secret not in listed.text + audit.text + caplog.text


async def test_the_secret_of_a_token_is_not_stored_with_idempotency_keys(client, tmp_path):
    body, headers = {"owner": "ann", "scopes": ["submit"]}, {"Idempotency-Key": "once"}
    made = (await client.post("/v1/tokens", json=body, headers=headers)).json()
    again = await client.post("/v1/tokens", json=body, headers=headers)
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (409, "true")
    assert again.headers["content-type"] == "application/problem+json"
    assert made["id"] in again.json()["detail"]
    assert len((await client.get("/v1/tokens")).json()["tokens"]) == 2
    for path in tmp_path.glob("test.db*"):
        assert made["token"].encode() not in path.read_bytes()


async def test_the_current_token_is_shown(client, as_owner):
    ann = await as_owner("ann", "read", "submit")
    me = (await ann.get("/v1/me")).json()
    token = (await client.get("/v1/tokens")).json()["tokens"][0]
    assert me == {"owner": "ann", "scopes": ["read", "submit"], "token_id": token["id"]}
    assert token["last_used_at"] >= token["created_at"]


async def test_the_last_admin_token_cannot_be_revoked(client, as_owner):
    mine = (await client.get("/v1/me")).json()["token_id"]
    refused = await client.post(f"/v1/tokens/{mine}:revoke")
    assert (refused.status_code, mine in refused.json()["detail"]) == (409, True)
    other = await as_owner("ann", "admin")
    assert (await other.post(f"/v1/tokens/{mine}:revoke")).json()["revoked_at"]
    assert (await client.get("/v1/me")).status_code == 401
    assert (await other.post("/v1/tokens/token-0:revoke")).status_code == 404


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"owner": "Ann"}, "owner"),
        ({"owner": ""}, "owner"),
        ({"owner": "../x"}, "owner"),
        ({"owner": "a" * 81}, "owner"),
        ({"owner": "shared"}, "owner"),
        ({"owner": "dispatcher"}, "owner"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["write"]}, "scopes[0]"),
        ({"expires_in_seconds": 0}, "expires_in_seconds"),
        ({"colour": 1}, "colour"),
    ],
)
async def test_an_invalid_token_is_rejected(client, change, field):
    refused = await client.post("/v1/tokens", json={"owner": "ann", "scopes": ["read"]} | change)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, field)
    assert len((await client.get("/v1/tokens")).json()["tokens"]) == 1


async def start(tmp_path, ray, mlflow, token, shown):
    settings = Settings(
        token=token, database_url=f"sqlite+aiosqlite:///{tmp_path}/first.db", storage=tmp_path / "storage"
    )
    app = make_app(settings, ray, mlflow, shown.append)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


async def test_the_first_start_creates_an_admin_token_and_shows_it_once(tmp_path, ray, mlflow, caplog):
    shown = []
    for _ in range(2):
        async for client in start(tmp_path, ray, mlflow, None, shown):
            me = await client.get("/v1/me", headers={"Authorization": f"Bearer {shown[0]}"})
            assert (me.json()["owner"], me.json()["scopes"]) == ("admin", ["admin"])
    assert len(shown) == 1
    assert shown[0] not in caplog.text
    # An operator who has lost all tokens gets access again.
    async for client in start(tmp_path, ray, mlflow, TOKEN, shown):
        for secret in (TOKEN, shown[0]):
            assert (
                await client.get("/v1/me", headers={"Authorization": f"Bearer {secret}"})
            ).status_code == 200
    assert len(shown) == 1
    assert "no valid token with scope admin" not in caplog.text
    async for client in start(tmp_path, ray, mlflow, TOKEN, shown):
        token_id = (await client.get("/v1/me", headers={"Authorization": f"Bearer {TOKEN}"})).json()[
            "token_id"
        ]
        await client.post(f"/v1/tokens/{token_id}:revoke", headers={"Authorization": f"Bearer {shown[0]}"})
    async for client in start(tmp_path, ray, mlflow, TOKEN, shown):
        assert (await client.get("/v1/me", headers={"Authorization": f"Bearer {TOKEN}"})).status_code == 401
    assert f"{token_id}, which is no valid token with scope admin" in caplog.text


async def test_the_given_token_is_stored_as_a_hash(app, client, tmp_path):
    assert (await client.get("/v1/me")).status_code == 200
    async with app.state.components.database.write() as connection:
        await connection.execute(text("SELECT 1"))
    for path in tmp_path.glob("test.db*"):
        assert TOKEN.encode() not in path.read_bytes()
