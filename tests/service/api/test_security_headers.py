import asyncio
import re
from dataclasses import replace

import httpx
import pytest

from service.api.security_headers import PAGES
from service.domain.access import RateLimit
from tests.service.api.conftest import TOKEN


async def test_a_rate_limited_token_gets_retry_after(app, client, as_owner):
    ann = await as_owner("ann")
    app.state.components = replace(app.state.components, rates=RateLimit(per_second=2, burst=3))
    answers = [await client.get("/v1/me") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["Retry-After"] == "1"
    assert answers[-1].headers["content-type"] == "application/problem+json"
    assert (await ann.get("/v1/me")).status_code == 200
    await asyncio.sleep(1)
    assert (await client.get("/v1/me")).status_code == 200


async def test_guessing_tokens_is_rate_limited_per_client(client, other_anonymous):
    answers = [
        await other_anonymous.get("/v1/me", headers={"Authorization": f"Bearer {n}"}) for n in range(30)
    ]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:20] == [401] * 20
    assert statuses[25:] == [429] * 5
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert (await client.get("/v1/me")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/me", "/v1/jobs/job-0", "/v1/nothing", "/nothing", "/openapi.json", "/livez"]
)
async def test_every_response_has_the_security_headers(client, path):
    headers = (await client.get(path)).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers.get("Cache-Control") == ("no-store" if path.startswith("/v1") else None)


async def test_errors_have_the_security_headers(app, client):
    large = await client.post("/v1/jobs", content=b"x" * 2_000_000, headers={"Idempotency-Key": "x"})
    app.state.components.jobs.page = None
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        broken = await other.get("/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (large.status_code, broken.status_code) == (413, 500)
    for answer in (large, broken):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/docs", "/sign-in"])
async def test_pages_hold_no_script_and_no_style_and_load_them_from_this_service(other_anonymous, path):
    page = await other_anonymous.get(path)
    assert page.headers["Content-Security-Policy"] == PAGES
    assert page.headers["Referrer-Policy"] == "same-origin"  # without it, forms have no origin
    assert page.headers["Cache-Control"] == "no-store"
    assert not re.search(r"<style|<script>|style=|onclick=|//cdn|https?://", page.text)


def test_the_policy_of_pages_allows_only_this_service():
    assert PAGES == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
