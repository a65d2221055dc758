import httpx
import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_the_operations_are_shown_without_any_other_host(visit):
    page = visit(signed_in=False).page
    page.goto("/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    paths = httpx.get(f"{page.url.removesuffix('/docs')}/openapi.json", timeout=10).json()["paths"]
    expect(page.locator(".opblock")).to_have_count(sum(len(operations) for operations in paths.values()))
    page.locator("#operations-jobs-list_jobs button").first.click()
    expect(page.get_by_text("List the jobs of the caller that match all filters")).to_be_visible()
