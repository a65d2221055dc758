import pytest
from playwright.sync_api import expect

from service.cli.progress import wait_for_job
from tests.service.running_api import TOKEN

pytestmark = pytest.mark.browser


def test_a_list_and_a_job_are_updated_until_the_job_ends(visit, api):
    job_id = api.submit_named("watched", "watched")
    page = visit().page
    page.goto("/jobs?tag=watched")
    expect(page.locator("tbody .badge")).to_have_text("queued")
    api.begin(job_id)
    expect(page.locator("tbody .badge")).to_have_text("running")
    expect(page.locator("tbody .progress")).to_contain_text("40 %")
    page.get_by_role("link", name="watched").first.click()
    expect(page.locator("h1")).to_have_text("watched")
    expect(page.locator("#curves .uplot canvas").first).to_be_visible()
    api.finish(job_id)
    expect(page.locator("#live .badge").first).to_have_text("succeeded")
    expect(page.locator("#live")).not_to_have_attribute("hx-get", "x")
    assert page.locator("#live").get_attribute("hx-get") is None


def test_a_job_is_cancelled_and_cloned_by_buttons(visit, api):
    job_id = api.submit_named("unwanted")
    page = visit().page
    page.goto(f"/jobs/{job_id}")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#live .badge").first).to_have_text("cancelled")
    page.get_by_text("Clone or resume with changes").click()
    page.get_by_label("Name").fill("wanted")
    page.get_by_label("Changed fields").fill("steps: 12")
    page.get_by_role("button", name="Clone with changes").click()
    expect(page.locator("h1")).to_have_text("wanted")
    expect(page.get_by_role("heading", name=f"Differences to {job_id}")).to_be_visible()


def test_a_log_is_followed_and_a_progress_bar_stays_one_line(visit, api):
    job_id = api.submit_named("talkative")
    api.begin(job_id)
    api.write(job_id, "INFO first <b>line</b>\n")
    page = visit().page
    page.goto(f"/jobs/{job_id}/logs")
    log = page.locator("#log")
    expect(log).to_contain_text("INFO first <b>line</b>")
    api.write(job_id, "step 1 of 9\r", "log-rank-00000.txt")
    expect(log).to_contain_text("step 1 of 9")
    api.write(job_id, "step 2 of 9\r", "log-rank-00000.txt")
    expect(log).to_contain_text("step 2 of 9")
    expect(log).not_to_contain_text("step 1 of 9")
    api.write(job_id, "\nERROR last line\n", "log-rank-00000.txt")
    api.finish(job_id)
    expect(log).to_contain_text("End of the log of attempt 1")
    expect(log.locator(".error")).to_have_text("rank 0ERROR last line")
    page.get_by_label("Search").fill("LAST")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#log > div:not(#more)")).to_have_count(1)


def test_pages_work_without_scripts(visit, api, ids):
    page = visit(java_script_enabled=False).page
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.get_by_label("State").select_option("failed")
    page.get_by_label("Tag").fill("wanted:failed")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="digits failed").click()
    expect(page.locator("#curves svg").first).to_be_visible()
    page.get_by_text("Values", exact=True).click()
    expect(page.locator("#curves td", has_text="0.92")).to_be_visible()
    page.get_by_role("link", name="Log", exact=True).click()
    expect(page.locator("h1")).to_contain_text("Log of digits failed")
    job_id = api.submit_named("without scripts")
    page.goto(f"/jobs/{job_id}")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("heading", name="without scripts").wait_for()
    with api.client() as client:
        wait_for_job(client, client.job(job_id))
    page.reload()
    expect(page.locator("#live .badge").first).to_have_text("cancelled")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()


def test_a_job_is_cancelled_by_the_keyboard_alone(visit, api):
    job_id = api.submit_named("by keyboard", "keyboard")
    page = visit(signed_in=False).page
    page.goto("/jobs?tag=keyboard")
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{api.url}/jobs?tag=keyboard")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    expect(page.locator(":focus")).to_be_in_viewport()
    page.keyboard.press("Enter")
    tab_to(page, "by keyboard")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("by keyboard")
    tab_to(page, "Cancel")
    page.keyboard.press("Enter")
    expect(page.locator("#live .badge").first).to_have_text("cancelled")
    assert page.url == f"{api.url}/jobs/{job_id}"


def tab_to(page, text, most=40):
    """Press Tab until the element with a text has the focus, which must be visible."""
    for _ in range(most):
        page.keyboard.press("Tab")
        focus = page.locator(":focus")
        if focus.inner_text() == text:
            outline = focus.evaluate("element => getComputedStyle(element).outlineStyle")
            assert outline == "solid"
            return
    raise AssertionError(f"{text} is not reached by {most} times Tab")
