import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
MARKUP = '<img src=x onerror="document.title=1"><script>document.title = 1</script>'


def test_text_of_user_code_stays_text_on_every_page(visit, api):
    job_id = api.submit_named("hostile", "hostile")
    api.begin(job_id)
    api.write(job_id, f"ERROR {MARKUP}\n")
    api.write(job_id, f"{MARKUP}\r", "log-rank-00000.txt")
    page = visit().page
    page.goto(f"/jobs/{job_id}/logs")
    expect(page.locator("#log")).to_contain_text(MARKUP)
    api.move(job_id, "failed", reason=f"ValueError: {MARKUP}")
    for path in (f"/jobs/{job_id}", "/jobs?tag=hostile", f"/jobs/{job_id}/logs?search={MARKUP}"):
        page.goto(path)
        expect(page.locator("main")).to_contain_text("<img src=x")
        assert page.locator("main img, main script").count() == 0
        assert page.title() != "1"
    page = visit(may_fail=True).page  # these answer with errors
    for path in (f"/jobs?tag={MARKUP}", "/jobs/<b>x", f"/sign-in?next=/{MARKUP}", f"/submit?recipe={MARKUP}"):
        with page.expect_response(lambda answer: answer.request.is_navigation_request()) as answer:
            page.goto(path)
        assert answer.value.status in (200, 303, 404, 422)
        assert page.locator("main img, main script").count() == 0
