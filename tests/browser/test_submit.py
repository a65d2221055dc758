import re

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def test_a_draft_is_checked_while_it_is_written_and_then_submitted(visit):
    page = visit().page
    page.goto("/submit")
    check = page.locator("#check")
    page.get_by_label("Name", exact=True).fill("by hand")
    page.get_by_label("steps", exact=True).fill("0")
    expect(check.get_by_text("spec.steps")).to_be_visible()
    page.get_by_label("steps", exact=True).fill("10")
    page.get_by_label("Field", exact=True).first.fill("norm")
    page.get_by_label("Values", exact=True).first.fill("none, sync")
    expect(check.locator("dd").first).to_have_text("2")
    expect(page.get_by_label("Values", exact=True).first).to_be_focused()  # the check leaves the form alone
    page.get_by_role("button", name="Show as YAML").click()
    text = page.get_by_label("Submission as YAML")
    expect(text).to_have_value(re.compile(r"matrix:\n  norm: \[none, sync\]"))
    text.fill(text.input_value().replace("sync", "batch"))
    expect(check.locator("dd").first).to_have_text("2")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page).to_have_url(re.compile(r"/comparisons/comparison-"))
    expect(page.get_by_role("link", name="norm=batch")).to_be_visible()


def test_another_model_has_other_fields(visit):
    page = visit().page
    page.goto("/submit")
    name = page.get_by_label("model.name")
    name.fill("cnn")
    name.blur()
    expect(page.get_by_label("model.channels")).to_be_visible()
    expect(page.get_by_label("model.hidden")).to_have_count(0)


def test_a_recipe_is_submitted_without_scripts(visit, api):
    page = visit(java_script_enabled=False).page
    page.goto("/submit")
    page.get_by_role("button", name="demo: 6 runs of fig1-activations").click()
    expect(page.locator("h1")).to_have_text("fig1-activations")
    with api.client() as client:
        newest = next(iter(client.comparisons()))
    assert page.url.endswith(f"/comparisons/{newest.id}")
    assert newest.jobs["queued"] == 6


def test_tokens_and_webhooks_are_managed_on_the_page_of_settings(visit, api):
    page = visit().page
    page.goto("/settings")
    form = page.get_by_role("form", name="New token")
    form.get_by_label("Owner").fill("eve")
    form.get_by_role("button").click()
    secret = page.locator("#secret").inner_text()
    with api.client() as client:
        token = next(token for token in client.tokens() if token.owner == "eve")
    own = visit(signed_in=False)
    own.sign_in(secret)
    expect(own.page.get_by_text("There is no job yet")).to_be_visible()
    page.get_by_role("button", name=f"Revoke {token.name}, {token.id}").click()
    expect(page.get_by_role("row", name=token.id)).to_contain_text("revoked")
    own.page.goto("/jobs")
    expect(own.page.get_by_label("Token")).to_be_visible()
