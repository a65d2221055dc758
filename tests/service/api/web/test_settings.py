import re

import pytest

TOKEN_FORM = {"owner": "ann", "name": "laptop", "days": "90", "scopes": ["read", "submit"]}
HOOK_FORM = {"url": "https://93.184.215.14/hooks", "states": ["failed"], "tag": "nightly"}


async def test_the_secret_of_a_new_token_is_shown_once_and_works(browser, other_anonymous):
    page = (await browser.post("/settings/tokens", data=TOKEN_FORM)).text
    secret = re.search(r'<code id="secret">(syncbn_[^<]+)</code>', page)[1]
    assert secret not in (await browser.get("/settings")).text
    me = await other_anonymous.get("/v1/me", headers={"Authorization": f"Bearer {secret}"})
    assert (me.json()["owner"], me.json()["scopes"]) == ("ann", ["read", "submit"])
    assert "laptop" in (await browser.get("/settings")).text


async def test_a_token_is_revoked(browser, client):
    await browser.post("/settings/tokens", data=TOKEN_FORM)
    found = (await client.get("/v1/tokens")).json()["tokens"][0]
    assert found["expires_at"] is not None
    assert (await browser.post(f"/settings/tokens/{found['id']}/revoke")).status_code == 303
    assert (await client.get("/v1/tokens")).json()["tokens"][0]["revoked_at"] is not None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"owner": "<b>"}, "owner"),
        ({"owner": "service"}, "owner"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["x"]}, "scopes[0]"),
        ({"days": "soon"}, "expires_in_seconds"),
        ({"days": "9" * 50}, "expires_in_seconds"),
        ({"name": "<script>"}, "name"),
    ],
)
async def test_a_wrong_token_form_is_refused_by_its_field(browser, client, change, field):
    answer = await browser.post("/settings/tokens", data=TOKEN_FORM | change)
    assert answer.status_code == 422
    assert f"<code>{field}</code>" in answer.text
    assert "<b>" not in answer.text
    assert len((await client.get("/v1/tokens")).json()["tokens"]) == 1


async def test_webhooks_are_added_and_deleted(browser, client):
    page = (await browser.post("/settings/webhooks", data=HOOK_FORM)).text
    assert re.search(r'<code id="secret">whsec_[^<]+</code>', page), page
    (hook,) = (await client.get("/v1/webhooks")).json()["webhooks"]
    assert (hook["url"], hook["states"], hook["tag"]) == (HOOK_FORM["url"], ["failed"], "nightly")
    assert hook["url"] in (await browser.get("/settings")).text
    assert (await browser.post(f"/settings/webhooks/{hook['id']}/delete")).status_code == 303
    assert (await client.get("/v1/webhooks")).json()["webhooks"] == []


async def test_all_webhooks_are_reached_page_by_page(browser, client, monkeypatch):
    monkeypatch.setattr("service.api.web.settings.PAGE_SIZE", 2)
    for _ in range(5):
        await browser.post("/settings/webhooks", data=HOOK_FORM)
    known = [hook["id"] for hook in (await client.get("/v1/webhooks")).json()["webhooks"]]
    address, pages = "/settings", []
    while address:
        page = (await browser.get(address)).text
        pages.append(re.findall(r'aria-label="Delete (webhook-[0-9a-f]+)"', page))
        link = re.search(r'href="([^"#]+)#webhooks-title">Older', page)
        address = link and link[1]
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [hook for page in pages for hook in page] == known
    assert (await browser.get("/settings?webhooks_page_token=x")).status_code == 422


async def test_a_webhook_to_a_private_address_is_refused_by_its_field(browser):
    answer = await browser.post("/settings/webhooks", data=HOOK_FORM | {"url": "https://127.0.0.1/x"})
    assert answer.status_code == 422
    assert "<code>url</code>" in answer.text


async def test_tokens_are_for_admins_and_webhooks_for_their_owner(browser, browse, client):
    await browser.post("/settings/webhooks", data=HOOK_FORM)
    (hook,) = (await client.get("/v1/webhooks")).json()["webhooks"]
    ann, reader = await browse("ann"), await browse("admin", "read")
    page = (await ann.get("/settings")).text
    assert "SYNCBN_TOKEN" not in page
    assert hook["id"] not in page
    assert (await ann.post("/settings/tokens", data=TOKEN_FORM)).status_code == 403
    assert (await ann.post(f"/settings/webhooks/{hook['id']}/delete")).status_code == 404
    assert hook["id"] in (await reader.get("/settings")).text
    assert (await reader.post(f"/settings/webhooks/{hook['id']}/delete")).status_code == 403
