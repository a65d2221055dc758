import pytest
from playwright.sync_api import expect

from tests.browser.populated import SPEC

pytestmark = pytest.mark.browser
PHONE = {"viewport": {"width": 390, "height": 844}}
POLL_MS = 15_000


def wait_for_poll(page):
    """Wait until htmx has fetched the page again and shows it."""
    page.evaluate("document.getElementById('live').dataset.old = 'yes'")
    expect(page.locator("#live[data-old]")).to_have_count(0, timeout=POLL_MS)


def test_a_poll_leaves_open_parts_open_and_scrolled_tables_where_they_are(visit, ids):
    page = visit(**PHONE).page
    page.goto(f"/comparisons/{ids['comparison']}")
    page.get_by_text("Rule of the verdict").click()
    page.get_by_text("Numbers of the chart").first.click()
    page.locator("#table-variants").evaluate("table => table.scrollTo(120, 0)")
    wait_for_poll(page)
    assert page.locator("#rule").get_attribute("open") is not None
    assert page.locator("#numbers").get_attribute("open") is not None
    assert page.locator("#table-variants").evaluate("table => table.scrollLeft") == 120
    page.get_by_text("Rule of the verdict").click()
    wait_for_poll(page)
    assert page.locator("#rule").get_attribute("open") is None


LONG = ["a" * 60, "b" * 60]


@pytest.fixture(scope="module")
def long_names(api):
    """Id of a comparison whose variants and jobs have long names, as far as they have ended."""
    body = {
        "name": "n" * 60,
        "spec": SPEC,
        "matrix": {"seed": [0, 1, 2]},
        "variants": {LONG[0]: {"norm": "none"}, LONG[1]: {"norm": "batch"}},
        "baseline": {"variant": LONG[0]},
        "target": 0.8,
    }
    with api.client() as client:
        made = client.submit_comparison(body)
    for job in made.jobs:
        api.begin(job.id)
        api.finish(job.id)
    return made.id


@pytest.mark.parametrize("path", ["/comparisons/{}", "/jobs?comparison={}"])
@pytest.mark.parametrize("scripts", [True, False])
def test_long_names_do_not_make_a_phone_scroll_sideways(visit, long_names, path, scripts):
    page = visit(**PHONE, java_script_enabled=scripts).page
    page.goto(path.format(long_names))
    if scripts and path.startswith("/comparisons"):
        page.locator("#chart .uplot").wait_for()
    expect(page.get_by_text(LONG[0]).first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


LINES = """cells => cells.map((cell) => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map((box) => box.top)).size;
})"""
"""Number of lines of each cell."""


@pytest.mark.parametrize("width", [390, 720, 1000])
def test_the_name_of_a_norm_stays_on_one_line(visit, long_names, width):
    page = visit(viewport={"width": width, "height": 800}).page
    page.goto(f"/jobs?comparison={long_names}")
    norms = page.locator("td[data-label=Norm]")
    expect(norms).to_have_count(6)
    assert norms.evaluate_all(LINES) == [1] * 6


def test_the_numbers_of_a_report_file_are_printed(visit, chromium, ids, tmp_path):
    file = tmp_path / "report.html"
    answer = visit().page.request.get(f"/comparisons/{ids['comparison']}/report.html")
    file.write_bytes(answer.body())
    page = chromium.new_page()
    page.goto(file.as_uri())
    numbers = page.locator("details table").first
    assert not numbers.evaluate("table => table.checkVisibility()")
    page.emulate_media(media="print")
    assert numbers.evaluate("table => table.checkVisibility()")
    assert numbers.bounding_box()["height"] > 50
    page.close()
