from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
AXE = Path(__file__).parents[2] / "build/npm/node_modules/axe-core/axe.min.js"
PAGES = [
    "/",
    "/jobs",
    "/jobs/{running}",
    "/jobs/{failed}",
    "/jobs/{running}/logs",
    "/comparisons/{comparison}",
    "/submit",
    "/submit?recipe=lr-sweep",
    "/cluster",
    "/settings",
]
SIGNED_OUT = ["/sign-in"]
NARROW = [*PAGES, *SIGNED_OUT, "/docs"]


@pytest.fixture(scope="module")
def axe():
    assert AXE.exists(), "tests of accessibility need axe-core: make setup"
    return AXE.read_text()


# The schemes differ in their colours alone.
@pytest.mark.parametrize(("scheme", "rules"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})])
def test_axe_finds_no_violation(visit, ids, axe, scheme, rules):
    signed_in, anonymous = visit(color_scheme=scheme), visit(color_scheme=scheme, signed_in=False)
    found = {}
    for visitor, paths in ((signed_in, PAGES), (anonymous, SIGNED_OUT)):
        for path in paths:
            visitor.page.goto(path.format(**ids))
            visitor.page.evaluate(axe)
            result = visitor.page.evaluate("rules => axe.run(rules)", rules | {"resultTypes": ["violations"]})
            found |= {
                (path, each["id"], node["html"][:200]): node["failureSummary"]
                for each in result["violations"]
                for node in each["nodes"]
            }
    assert not found


def test_no_page_scrolls_sideways_at_a_zoom_of_400_percent(visit, ids):
    page = visit(viewport={"width": 320, "height": 256}).page  # 1280 by 1024 at 400 %
    for path in NARROW:
        page.goto(path.format(**ids))
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 320, f"{path} is {width} px wide"
