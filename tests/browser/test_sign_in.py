from urllib.parse import quote

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def session_of(visitor):
    return next(cookie for cookie in visitor.context.cookies() if cookie["name"] == "syncbn_session")


def test_the_session_is_out_of_reach_of_scripts_and_other_sites(visit):
    visitor = visit()
    cookie = session_of(visitor)
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert visitor.page.evaluate("document.cookie") == ""


def test_a_link_signs_in_once_and_leads_to_its_page(visit, api):
    with api.client() as client:
        link = client.create_sign_in_link("/jobs?state=failed").url
    page = visit(signed_in=False).page
    page.goto(link)
    expect(page).to_have_url(f"{api.url}/jobs?state=failed")
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    other = visit(signed_in=False, may_fail=True)
    other.page.goto(link)
    expect(other.page.get_by_role("alert")).to_contain_text("has been used")


def test_a_link_on_another_site_opens_a_page_of_a_signed_in_browser(visit, api, elsewhere):
    visitor = visit(allowed=(elsewhere,))
    visitor.page.goto(f"{elsewhere}/?to={quote(api.url + '/jobs?state=failed')}")
    visitor.page.get_by_role("link").click()
    expect(visitor.page).to_have_url(f"{api.url}/jobs?state=failed")
    expect(visitor.page.get_by_role("heading", name="Jobs")).to_be_visible()


def test_a_form_on_another_site_changes_nothing(visit, api, elsewhere):
    job_id = api.submit_named("attacked")
    visitor = visit(allowed=(elsewhere,))
    visitor.page.goto(f"{elsewhere}/?to={api.url}/jobs/{job_id}/cancel")
    visitor.page.get_by_role("button").click()
    # Sent without the session: to the sign-in page, which leads on where the browser is signed in.
    visitor.page.wait_for_url(lambda url: url == f"{api.url}/" or url.startswith(f"{api.url}/sign-in"))
    with api.client() as client:
        assert not client.job(job_id).cancel_requested
