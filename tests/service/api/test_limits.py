import asyncio
from dataclasses import replace

import httpx
import pytest

from service.domain.access import RateLimit
from tests.service.api.conftest import TOKEN


async def test_a_token_that_asks_too_often_is_told_when_to_come_again(app, client, as_owner):
    ann = await as_owner("ann")
    app.state.components = replace(app.state.components, rates=RateLimit(per_second=2, burst=3))
    answers = [await client.get("/v1/me") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["Retry-After"] == "1"
    assert answers[-1].headers["content-type"] == "application/problem+json"
    assert (await ann.get("/v1/me")).status_code == 200
    await asyncio.sleep(1)
    assert (await client.get("/v1/me")).status_code == 200


async def test_whoever_guesses_is_slowed_down_and_others_are_not(client, anyone_else):
    answers = [await anyone_else.get("/v1/me", headers={"Authorization": f"Bearer {n}"}) for n in range(30)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:20] == [401] * 20
    assert statuses[25:] == [429] * 5
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert (await client.get("/v1/me")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/me", "/v1/jobs/job-0", "/v1/nothing", "/nothing", "/docs", "/openapi.json", "/livez"]
)
async def test_every_answer_carries_the_headers(client, path):
    headers = (await client.get(path)).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers.get("Cache-Control") == ("no-store" if path.startswith("/v1") else None)


async def test_errors_of_ours_and_bodies_without_end_carry_them_too(app, client):
    large = await client.post("/v1/jobs", content=b"x" * 2_000_000, headers={"Idempotency-Key": "x"})
    app.state.components.jobs.page = None
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        broken = await other.get("/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (large.status_code, broken.status_code) == (413, 500)
    for answer in (large, broken):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


async def test_the_page_of_the_api_may_load_what_it_is_made_of(client):
    page = await client.get("/docs")
    policy = page.headers["Content-Security-Policy"]
    assert "https://cdn.jsdelivr.net/npm/swagger-ui" in page.text
    assert "script-src 'unsafe-inline' https://cdn.jsdelivr.net" in policy
    assert "connect-src 'self'" in policy
