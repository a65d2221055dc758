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
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers={"Origin": "http://test"}
    ) as browser:
        yield browser


async def test_a_sign_in_link_works_once_and_redirects_to_its_page(client, browser):
    link = urlsplit(await make_link(client, next=PAGE))
    assert f"{link.scheme}://{link.netloc}{link.path}" == "http://syncbn.example/sign-in"
    assert not link.query  # the link that is sent, logged and previewed holds no code
    assert (await browser.get("/sign-in")).status_code == 200
    form = dict(parse_qsl(link.fragment))
    assert form["next"] == PAGE
    answer = await browser.post("/sign-in", data=form)
    assert (answer.status_code, answer.headers["location"]) == (303, PAGE)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert is_signed_in(browser)
    assert (await browser.get("/mlflow/ajax-api/3.0/mlflow/assistant/config")).status_code == 403  # signed in
    browser.cookies.clear()
    again = await browser.post("/sign-in", data=form)
    assert again.status_code == 401
    assert "has been used or has expired" in again.text
    assert not is_signed_in(browser)


async def test_the_form_accepts_a_valid_token_and_rejects_a_wrong_one(client, browser):
    form = await browser.get("/sign-in", params={"next": PAGE})
    assert 'action="/sign-in"' in form.text
    assert f'value="{PAGE}"' in form.text
    wrong = await browser.post("/sign-in", data={"token": "wrong", "next": PAGE})
    assert (wrong.status_code, is_signed_in(browser)) == (401, False)
    right = await browser.post("/sign-in", data={"token": TOKEN, "next": PAGE})
    assert (right.status_code, right.headers["location"], is_signed_in(browser)) == (303, PAGE, True)
    assert TOKEN not in right.headers["set-cookie"]
    secret = browser.cookies["syncbn_session"]
    refused = await browser.post("/sign-out", headers={"Origin": "https://elsewhere.example"})
    assert (refused.status_code, is_signed_in(browser)) == (403, True)
    await browser.post("/sign-out", headers={"Origin": "http://test"})
    assert not is_signed_in(browser)
    browser.cookies["syncbn_session"] = secret
    assert (await browser.get("/mlflow/")).status_code == 401


async def test_a_metrics_token_opens_neither_pages_nor_mlflow(client, anonymous, browser):
    made = await client.post("/v1/tokens", json={"owner": "ops", "name": "prometheus", "scopes": ["metrics"]})
    secret = made.json()["token"]
    answer = await browser.post("/sign-in", data={"token": secret, "next": PAGE})
    assert (answer.status_code, is_signed_in(browser)) == (403, False)
    bearer = {"Authorization": f"Bearer {secret}"}
    assert (await anonymous.get("/metrics", headers=bearer)).status_code == 200
    for path in (
        "/mlflow/",
        "/mlflow/ajax-api/2.0/mlflow/experiments/get?experiment_id=1",
        "/v1/jobs",
        "/v1/me",
    ):
        assert (await anonymous.get(path, headers=bearer)).status_code == 403, path


async def test_a_session_ends_with_its_token(client, as_owner, browser):
    reader = await as_owner("ann", "read")
    link = urlsplit(await make_link(reader))
    await browser.post("/sign-in", data=dict(parse_qsl(link.fragment)))
    assert (await browser.get("/mlflow/x")).status_code == 403
    token = (await reader.get("/v1/me")).json()["token_id"]
    await client.post(f"/v1/tokens/{token}:revoke")
    assert (await browser.get("/mlflow/x")).status_code == 401


async def test_a_session_does_not_authorise_api_calls(client, browser):
    await browser.post("/sign-in", data={"token": TOKEN})
    assert (await browser.get("/v1/jobs")).status_code == 401


async def test_anonymous_requests_get_the_form_without_external_resources(browser):
    page = await browser.get("/mlflow/")
    assert page.status_code == 401
    assert "<form" in page.text
    assert not re.search(r"(src|href)=\"(?![/#])", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert (await browser.get("/mlflow/static-files/x.js")).headers["www-authenticate"] == "Bearer"
    assert (await browser.get("/mlflow")).headers["location"] == "/mlflow/"


async def test_the_sign_in_page_leads_on_where_the_browser_is_signed_in(browser):
    assert (await browser.get("/sign-in/session")).json() == {"is_signed_in": False}
    await browser.post("/sign-in", data={"token": TOKEN})
    assert (await browser.get("/sign-in/session")).json() == {"is_signed_in": True}
    answer = await browser.get("/sign-in", params={"next": "/mlflow/"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/mlflow/")


async def test_wrong_tokens_and_codes_are_rate_limited(browser):
    codes = [(await browser.post("/sign-in", data={"code": "x"})).status_code for _ in range(15)]
    tokens = [(await browser.post("/sign-in", data={"token": "x"})).status_code for _ in range(15)]
    assert codes[0] == 401
    assert tokens[-1] == 429


@pytest.mark.parametrize(
    "target",
    [
        None,
        "",
        "x",
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "/a\r\nX: y",
        "/\t/evil.example",
    ],
)
def test_a_sign_in_does_not_redirect_to_another_site(target):
    assert local_path(target) == HOME


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "", "/a\nb", 7])
async def test_a_link_to_another_site_is_refused(client, target):
    refused = await client.post("/v1/sign-in-links", json={"next": target})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "next"


async def test_the_form_escapes_text_of_its_url(browser):
    page = await browser.get("/sign-in", params={"next": '/"><script>alert(1)</script>'})
    assert "<script>alert" not in page.text


async def test_a_large_form_is_refused(browser):
    assert (await browser.post("/sign-in", content=b"token=" + b"x" * 20_000)).status_code == 413


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://test", 303),
        ("http://syncbn.example", 303),
        ("https://test", 403),
        ("https://syncbn.example", 403),
        ("http://syncbn.example:8080", 403),
        (None, 403),
        ("https://elsewhere.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
async def test_a_cross_site_form_cannot_sign_in(browser, origin, status):
    del browser.headers["Origin"]
    headers = {"Origin": origin} if origin else {}
    answer = await browser.post("/sign-in", data={"token": TOKEN}, headers=headers)
    assert (answer.status_code, is_signed_in(browser)) == (status, status == 303)


@pytest.mark.parametrize("origin", ["http://test", "http://syncbn.example"])
async def test_a_default_port_and_capitals_of_a_host_do_not_matter(browser, origin):
    headers = {"Host": "TEST:80", "Origin": origin}
    assert (await browser.post("/sign-in", data={"token": TOKEN}, headers=headers)).status_code == 303


async def test_a_new_sign_in_ends_the_earlier_session(browser):
    await browser.post("/sign-in", data={"token": TOKEN})
    earlier = browser.cookies["syncbn_session"]
    await browser.post("/sign-in", data={"token": "wrong"})
    assert (await browser.get("/sign-in/session")).json() == {"is_signed_in": True}
    await browser.post("/sign-in", data={"token": TOKEN})
    assert (await browser.get("/sign-in/session")).json() == {"is_signed_in": True}
    browser.cookies.clear()
    browser.cookies["syncbn_session"] = earlier
    assert (await browser.get("/sign-in/session")).json() == {"is_signed_in": False}
