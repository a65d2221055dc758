"""Browsers that are signed in, without a browser: their cookies and their origin."""

from contextlib import AsyncExitStack

import httpx
import pytest

from tests.service.api.conftest import TOKEN

SPEC = {"model": {"name": "mlp", "hidden": [8]}, "data": {"name": "digits"}, "steps": 10, "num_workers": 1}


@pytest.fixture
async def browse(app, client):
    """Sign browsers in, by a token of the admin or of another owner."""
    async with AsyncExitStack() as stack:

        async def make(owner=None, *scopes):
            token = TOKEN
            if owner is not None:
                body = {"owner": owner, "scopes": list(scopes) or ["submit"]}
                token = (await client.post("/v1/tokens", json=body)).json()["token"]
            browser = await stack.enter_async_context(
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(app),
                    base_url="http://test",
                    headers={"Origin": "http://test"},
                )
            )
            assert (await browser.post("/sign-in", data={"token": token})).status_code == 303
            return browser

        yield make


@pytest.fixture
async def browser(browse):
    """A browser of the admin."""
    return await browse()


@pytest.fixture
def submit(client):
    async def make(name="mine", **changes):
        made = await client.post("/v1/jobs", json={"name": name, "spec": SPEC} | changes)
        assert made.status_code == 202, made.text
        return made.json()["id"]

    return make
