"""A comparison's link in Chromium: the curves of its saved view, by the real MLflow behind the proxy."""

import math
import time
from urllib.parse import quote

import pytest
from mlflow.entities import Metric
from playwright.sync_api import TimeoutError as PageTimeoutError
from playwright.sync_api import expect

from service.domain.lifecycle import RayStatus
from service.domain.mlflow_views import run_url
from service.domain.resources import Resources
from tests.fakes import FakeRay
from tests.service.engine.outcomes import SUCCEEDED
from tests.service.running_api import TOKEN, RunningApi
from trainer.jobspec import OUTCOME_FILE

pytestmark = pytest.mark.browser

PAGE_TIMEOUT_MS = 40_000
START_TIMEOUT_SECONDS = 60
METRICS = ("accuracy", "test_loss", "train_loss")
SPEC = {"model": {"name": "mlp", "hidden": [8]}, "data": {"name": "digits"}, "steps": 20, "num_workers": 1}
BODY = {
    "name": "does BN help",
    "spec": SPEC,
    "matrix": {"norm": ["none", "sync"], "seed": [0, 1, 2]},
    "target": 0.8,
}
FORMAT = (
    "MLflow does not draw the saved view: its format has changed. Adapt service/domain/mlflow_views.py, or "
    "lower SUPPORTED_VERSION, so that links lead to the parent run"
)


@pytest.fixture(scope="module")
def api(tmp_path_factory, mlflow_server):
    """API with the real MLflow; jobs are submitted, and a test logs their metrics."""
    api = RunningApi(
        tmp_path_factory.mktemp("api"),
        FakeRay(total=Resources(cpus=64, gpus=0)),
        mlflow_url=mlflow_server[0],
        mlflow_secret=mlflow_server[1],
        call_timeout_seconds=60,
        check_seconds=0,
        rate_per_second=100_000,
        rate_burst=100_000,
    )
    api.start()
    yield api
    api.stop()


@pytest.fixture(scope="module")
def comparison(api):
    """Comparison of two norms on three seeds with their curves in MLflow."""
    with api.client() as client:
        found = client.submit_comparison(BODY)
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while any(job.mlflow_run_id is None for job in found.jobs):
            assert time.monotonic() < deadline, [job.reason for job in found.jobs]
            time.sleep(0.1)
            found = client.comparison(found.id)
    for job in found.jobs:
        log_curves(api, job)
    return found


def log_curves(api, job):
    """Log 20 points of each metric, as the trainer does."""
    speed = {"none": 0.05, "sync": 0.4}[job.norm] * (1 + job.seed / 10)
    metrics = [
        Metric(name, value, 1_000 * step, step)
        for step in range(20)
        for name, value in (
            ("accuracy", 1 - math.exp(-speed * step)),
            ("test_loss", 2 * math.exp(-speed * step)),
            ("train_loss", 2.1 * math.exp(-speed * step)),
            ("learning_rate", 0.1),
        )
    ]
    client = api.app.state.components.mlflow._client
    client.log_batch(job.mlflow_run_id, metrics=metrics)


@pytest.fixture(scope="module")
def page(chromium):
    page = chromium.new_page(viewport={"width": 1_500, "height": 1_300})
    page.set_default_timeout(PAGE_TIMEOUT_MS)
    yield page
    page.close()


COLOURS = """charts => charts.map(chart => new Set([...chart.querySelectorAll("path.js-line")]
  .filter(line => line.getAttribute("d")?.includes("L"))
  .map(line => getComputedStyle(line))
  .filter(style => style.strokeOpacity !== "0")
  .map(style => style.stroke)).size)"""
"""Number of colours of the lines of each chart."""


def sign_in(page, api):
    page.goto(f"{api.url}/sign-in")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()


def test_the_link_of_a_comparison_shows_its_curves_by_variant(api, comparison, page):
    sign_in(page, api)
    page.goto(comparison.mlflow_url)
    charts = page.get_by_test_id("experiment-view-compare-runs-card")
    try:
        for metric in METRICS:
            for norm in ("none", "sync"):
                charts.get_by_text(f"norm={norm} ({metric})").first.wait_for()
    except PageTimeoutError as error:
        raise AssertionError(f"{FORMAT}. The page shows: {page.inner_text('body')[:2_000]}") from error
    # A chart per metric that matters, instead of one for each metric, with a line per variant.
    expect(charts).to_have_count(len(METRICS), timeout=PAGE_TIMEOUT_MS)
    assert charts.evaluate_all(COLOURS) == [2] * len(METRICS), FORMAT
    text = page.inner_text("body")
    assert f"{comparison.name} ({comparison.id})" in text  # the name of the view
    assert "Group by: variant" in text
    assert "learning_rate" not in charts.all_inner_texts()
    assert "Welcome to MLflow" not in text  # the assistant, over the runs


def test_the_link_of_a_job_opens_its_run_in_the_layout_for_training(api, comparison, page):
    page.request.post(f"{api.url}/sign-in", form={"token": TOKEN}, headers={"Origin": api.url})
    page.goto(comparison.jobs[0].mlflow_url)
    page.get_by_role("heading", name=comparison.jobs[0].name).first.wait_for()
    page.get_by_text("Model metrics").first.wait_for()


@pytest.fixture(scope="module")
def parent_url(api, comparison):
    """End all jobs, and return the address of the parent run once its report is published."""
    for job in comparison.jobs:
        api.write(job.id, SUCCEEDED.model_dump_json(), OUTCOME_FILE)
        api.ray.set(f"{job.id}-a1", RayStatus.SUCCEEDED)
    stored = api.stored_comparison(comparison.id)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not stored.mlflow_closed:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        stored = api.stored_comparison(comparison.id)
    return run_url(f"{api.url}/mlflow", stored)


def test_the_parent_run_shows_verdict_table_summary_and_figures(api, parent_url, page):
    page.request.post(f"{api.url}/sign-in", form={"token": TOKEN}, headers={"Origin": api.url})
    page.goto(parent_url)
    page.reload()  # the page keeps runs that it has loaded for an earlier view
    page.get_by_text("norm=sync is best").filter(visible=True).first.wait_for()
    page.get_by_text("norm_sync/steps_to_target").filter(visible=True).first.wait_for()
    page.get_by_text("Show more").filter(visible=True).first.click()
    page.get_by_role("cell", name="faster", exact=True).filter(visible=True).first.wait_for()
    page.goto(parent_url.replace("?", "/artifacts/figures/curves.svg?"))
    figure = page.locator("img[src^='blob:']").first
    figure.wait_for()
    assert figure.evaluate("image => image.complete && image.naturalWidth") == 720


def test_a_link_on_another_site_opens_mlflow_in_a_signed_in_browser(api, comparison, visit, elsewhere):
    visitor = visit(api.url, allowed=(elsewhere,), may_fail=True)
    visitor.page.goto(f"{elsewhere}/?to={quote(comparison.jobs[0].mlflow_url)}")
    visitor.page.get_by_role("link").click()
    visitor.page.get_by_role("heading", name=comparison.jobs[0].name).first.wait_for()
    assert visitor.page.url.startswith(f"{api.url}/mlflow/#/")


def test_a_sign_in_link_leads_to_a_page_of_mlflow(api, comparison, visit):
    path = comparison.jobs[0].mlflow_url.removeprefix(api.url)
    with api.client() as client:
        link = client.create_sign_in_link(path).url
    visitor = visit(api.url, signed_in=False, may_fail=True)  # MLflow's own errors
    visitor.page.goto(link)
    visitor.page.get_by_role("heading", name=comparison.jobs[0].name).first.wait_for()
