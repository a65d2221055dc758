"""Story of a user in Chromium, on a real Ray and MLflow."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = [pytest.mark.e2e, pytest.mark.browser]
START_MS, TRAINING_MS = 90_000, 180_000


def test_a_comparison_of_real_jobs_is_read(visit, service, compared):
    visitor = visit(service.url, signed_in=False)
    visitor.sign_in(service.environment["SYNCBN_TOKEN"])
    page = visitor.page
    page.goto(f"/comparisons/{compared.split(':')[0]}")
    expect(page.locator("h1")).to_have_text("end to end")
    read_comparison(page, steps=100)


@pytest.mark.slow
def test_a_recipe_is_submitted_watched_and_read_and_another_job_is_cancelled(visit, service):
    visitor = visit(service.url, signed_in=False)
    visitor.sign_in(service.environment["SYNCBN_TOKEN"])
    page = visitor.page
    page.get_by_role("link", name="Submit", exact=True).click()
    page.get_by_role("link", name="edit fig1-activations, demo").click()
    for label, value in (("steps", "200"), ("eval_every", "20"), ("num_workers", "1")):
        field = page.get_by_label(label, exact=True)
        field.evaluate("element => element.closest('details').open = true")
        field.fill(value)
    page.get_by_label("Values", exact=True).nth(1).fill("0")  # one seed
    expect(page.locator("#check dd").first).to_have_text("2")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.locator("h1")).to_have_text("fig1-activations")
    read_comparison(page, steps=200)
    cancel_endless_job(page)


def read_comparison(page, steps):
    for norm in ("none", "sync"):
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name=f"norm={norm}"))
        expect(row.locator(".badge")).to_have_text("succeeded", timeout=TRAINING_MS)
    expect(page.locator(".verdict")).to_contain_text(
        re.compile(r"cannot tell|faster|slower|not", re.IGNORECASE)
    )
    page.get_by_role("link", name="norm=sync").click()
    expect(page.locator("#curves .uplot canvas").first).to_be_visible()
    page.get_by_role("link", name="Log", exact=True).click()
    expect(page.locator("#log")).to_contain_text(f"step {steps}/{steps}")


def cancel_endless_job(page):
    page.get_by_role("link", name="Submit", exact=True).click()
    page.get_by_label("Name", exact=True).fill("endless")
    page.get_by_label("steps", exact=True).fill("10_000_000")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.locator("h1")).to_have_text("endless")
    state = page.locator("#live .badge").first
    expect(state).to_have_text("running", timeout=START_MS)
    page.get_by_role("link", name="Log", exact=True).click()
    expect(page.locator("#log")).to_contain_text("/10000000", timeout=START_MS)
    page.get_by_role("link", name="endless").click()
    page.get_by_role("button", name="Cancel").click()
    expect(state).to_have_text("cancelled", timeout=START_MS)
