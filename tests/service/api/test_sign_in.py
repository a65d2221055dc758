import re
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest

from service.domain.access import HOME, local_path
from tests.service.api.conftest import TOKEN

PAGE = "/mlflow/#/experiments/1/runs/2"


async def make_link(client, **body):
    made = await client.post("/v1/sign-in-links", json=body)
    assert made.status_code == 201, made.text
    return made.json()["url"]


def is_signed_in(browser):
    return "syncbn_session" in browser.cookies


@pytest.fixture
async def browser(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as browser:
        yield browser


async def test_a_link_signs_in_once_and_leads_to_its_page(client, browser):
    link = urlsplit(await make_link(client, next=PAGE))
    assert f"{link.scheme}://{link.netloc}{link.path}" == "http://syncbn.example/sign-in"
    assert not link.query  # what is sent, logged and previewed holds no code
    assert (await browser.get("/sign-in")).status_code == 200
    form = dict(parse_qsl(link.fragment))
    assert form["next"] == PAGE
    answer = await browser.post("/sign-in", data=form)
    assert (answer.status_code, answer.headers["location"]) == (303, PAGE)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert is_signed_in(browser)
    assert (await browser.get("/mlflow/ajax-api/3.0/mlflow/assistant/config")).status_code == 403  # signed in
    browser.cookies.clear()
    again = await browser.post("/sign-in", data=form)
    assert again.status_code == 401
    assert "has been used or has expired" in again.text
    assert not is_signed_in(browser)


async def test_a_token_signs_in_by_the_form_and_a_wrong_one_does_not(client, browser):
    form = await browser.get("/sign-in", params={"next": PAGE})
    assert 'action="/sign-in"' in form.text
    assert f'value="{PAGE}"' in form.text
    wrong = await browser.post("/sign-in", data={"token": "wrong", "next": PAGE})
    assert (wrong.status_code, is_signed_in(browser)) == (401, False)
    right = await browser.post("/sign-in", data={"token": TOKEN, "next": PAGE})
    assert (right.status_code, right.headers["location"], is_signed_in(browser)) == (303, PAGE, True)
    assert TOKEN not in right.headers["set-cookie"]
    secret = browser.cookies["syncbn_session"]
    await browser.post("/sign-out")
    assert not is_signed_in(browser)
    browser.cookies["syncbn_session"] = secret
    assert (await browser.get("/mlflow/")).status_code == 401


async def test_a_session_ends_with_its_token(client, as_owner, browser):
    reader = await as_owner("ann", "read")
    link = urlsplit(await make_link(reader))
    await browser.post("/sign-in", data=dict(parse_qsl(link.fragment)))
    assert (await browser.get("/mlflow/x")).status_code == 403
    token = (await reader.get("/v1/me")).json()["token_id"]
    await client.post(f"/v1/tokens/{token}:revoke")
    assert (await browser.get("/mlflow/x")).status_code == 401


async def test_a_session_opens_no_call_of_the_api(client, browser):
    await browser.post("/sign-in", data={"token": TOKEN})
    assert (await browser.get("/v1/jobs")).status_code == 401


async def test_who_has_not_signed_in_gets_the_form_which_loads_nothing_from_elsewhere(browser):
    page = await browser.get("/mlflow/")
    assert page.status_code == 401
    assert "<form" in page.text
    assert not re.search(r"(src|href)=", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (await browser.get("/mlflow/static-files/x.js")).headers["www-authenticate"] == "Bearer"
    assert (await browser.get("/mlflow")).headers["location"] == "/mlflow/"


async def test_wrong_tokens_and_codes_are_limited(browser):
    codes = [(await browser.post("/sign-in", data={"code": "x"})).status_code for _ in range(15)]
    tokens = [(await browser.post("/sign-in", data={"token": "x"})).status_code for _ in range(15)]
    assert codes[0] == 401
    assert tokens[-1] == 429


@pytest.mark.parametrize(
    "target",
    [None, "", "x", "//evil.example", "/\\evil.example", "https://evil.example", "/a\r\nX: y", "/\t/evil.example"],
)
def test_a_sign_in_leads_to_no_other_site(target):
    assert local_path(target) == HOME


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "", "/a\nb", 7])
async def test_a_link_to_another_site_is_refused(client, target):
    refused = await client.post("/v1/sign-in-links", json={"next": target})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "next"


async def test_the_form_shows_no_text_of_its_address_as_markup(browser):
    page = await browser.get("/sign-in", params={"next": '/"><script>alert(1)</script>'})
    assert "<script>alert" not in page.text


async def test_a_large_form_is_refused(browser):
    assert (await browser.post("/sign-in", content=b"token=" + b"x" * 20_000)).status_code == 413
