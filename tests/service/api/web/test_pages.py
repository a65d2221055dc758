import pytest

PAGES = ["/", "/jobs", "/jobs?state=failed&tag=a"]


async def test_an_error_of_a_page_is_a_page(anonymous):
    refused = await anonymous.post("/sign-out", headers={"Origin": "https://elsewhere.example"})
    assert refused.status_code == 403
    assert refused.headers["content-type"].startswith("text/html")
    assert "Origin: must be this service (got &#39;https://elsewhere.example&#39;)" in refused.text


@pytest.mark.parametrize("path", PAGES)
async def test_without_a_session_a_page_leads_to_the_sign_in_page_and_back(anonymous, browser, path):
    sent = await anonymous.get(path)
    assert sent.status_code == 303
    page = await anonymous.get(sent.headers["location"])
    assert f'name="next" type="hidden" value="{path.replace("&", "&amp;")}"' in page.text
    assert (await browser.get(path)).status_code == 200


async def test_a_poll_without_a_session_makes_htmx_load_the_sign_in_page(anonymous):
    answer = await anonymous.get("/jobs", headers={"HX-Request": "true"})
    assert (answer.status_code, answer.headers["HX-Redirect"]) == (204, "/sign-in?next=/jobs")


@pytest.mark.parametrize(
    "origin", [None, "null", "https://elsewhere.example", "http://[", "http://test.evil"]
)
async def test_a_change_needs_the_origin_of_this_service(browser, submit, client, origin):
    job_id = await submit()
    if origin is None:
        del browser.headers["Origin"]
    else:
        browser.headers["Origin"] = origin
    refused = await browser.post(f"/jobs/{job_id}/cancel")
    assert refused.status_code == 403
    assert "Origin: must be this service" in refused.text
    assert not (await client.get(f"/v1/jobs/{job_id}")).json()["cancel_requested"]


async def test_pages_need_the_scope_of_their_change(browse, submit, client):
    job_id = await submit()
    reader = await browse("admin", "read")
    shown = await reader.get(f"/jobs/{job_id}")
    assert "Cancel" not in shown.text
    assert 'href="/submit"' not in shown.text + (await reader.get("/")).text
    refused = await reader.post(f"/jobs/{job_id}/cancel")
    assert refused.status_code == 403
    assert "this page needs a token with scope submit; yours has read" in refused.text


async def test_a_token_in_a_header_opens_no_page(client):
    assert (await client.get("/jobs")).status_code == 303


async def test_an_invalid_query_is_an_error_page_that_names_it(browser):
    page = await browser.get("/jobs?state=x")
    assert page.status_code == 422
    assert "state" in page.text
    assert "queued" in page.text
