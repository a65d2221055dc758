import asyncio
import csv
import io
import json
import re

import pytest

from service.domain.errors import UpstreamRejected
from tests.service.api.web.conftest import SPEC
from tests.service.domain.recipe_factory import FASTER

HOSTILE = "<script>alert(1)</script>"
BODY = {
    "name": "does BN help",
    "spec": SPEC | {"steps": 2000, "eval_every": 100},
    "matrix": {"norm": ["none", "sync"], "seed": [0, 1, 2]},
    "target": 0.8,
    "recipe": dict.fromkeys(("claim", "source", "paper", "falsified_if"), HOSTILE) | {"verdict": [FASTER]},
}


@pytest.fixture
async def comparison(client, app, ray, mlflow):
    """A comparison whose runs have curves, times and percentiles."""
    ray.is_down = True  # jobs change only by what follows
    made = (await client.post("/v1/comparisons", json=BODY)).json()
    jobs = app.state.components.jobs
    for job, steps in zip(made["jobs"], (1000, 1600, 1300, 100, 110, 120), strict=True):
        run_id = f"run-of-{job['id']}"
        mlflow.curves[run_id, "accuracy"] = [(0, 0.1), (steps - 10, 0.5), (steps, 0.85), (2000, 0.9)]
        mlflow.curves[run_id, "train_seconds"] = [(0, 1.0), (2000, 21.0)]
        for percent in (15, 50, 85):
            mlflow.curves[run_id, f"probe/activation3/unit50/p{percent}"] = [(0, 0.0), (2000, percent / 10)]
        async with asyncio.timeout(10):
            while await jobs.update_fields(await jobs.get(job["id"]), mlflow_run_id=run_id) is None:
                await asyncio.sleep(0.01)
    return made["id"]


async def test_the_page_begins_with_the_verdict_and_shows_the_whole_story(browser, comparison):
    page = (await browser.get(f"/comparisons/{comparison}")).text
    sentence = (
        "norm=sync is best: it needs 11.6 times fewer steps to accuracy ≥ 0.8 than norm=none (95 % interval"
    )
    parts = [
        sentence,
        "95 % intervals over seeds: times fewer steps than norm=none",
        "accuracy against step: mean and range over seeds",
        "Numbers of the chart",
        "Input of activation3, unit 50",
        '<h2 id="variants">Variants</h2>',
        "ms per step",
        "Claim: not enough data",  # no run has ended
        "How to reproduce",
    ]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert "Not finished (0 of 6 runs have ended; compared up to step 2,000)" in page
    assert HOSTILE not in page
    assert "style=" not in page
    assert len(page) < 100_000


@pytest.mark.parametrize(
    ("query", "label"),
    [("x=samples", "samples"), ("x=seconds&log=xy", "seconds of training"), ("smoothing=0.9&log=y", "step")],
)
async def test_axes_and_smoothing_are_in_the_address(browser, comparison, query, label):
    page = (await browser.get(f"/comparisons/{comparison}?{query}")).text
    assert f'aria-label="accuracy against {label}: ' in page
    curves = (await browser.get(f"/comparisons/{comparison}/curves.json?{query}")).json()
    assert curves["x_label"] == label
    assert [band["label"] for band in curves["bands"]] == ["norm=none", "norm=sync"]
    assert all(len(band["mean"]) == len(curves["x"]) for band in curves["bands"])
    assert curves["target"] == 0.8


@pytest.mark.parametrize("query", ["x=hours", "smoothing=1", "smoothing=x", "log=z"])
async def test_invalid_axes_are_named(browser, comparison, query):
    answer = await browser.get(f"/comparisons/{comparison}?{query}")
    assert answer.status_code == 422
    assert query.split("=")[0] in answer.text


async def test_reports_are_files(browser, client, comparison):
    for suffix, kind in (("html", "text/html"), ("md", "text/markdown"), ("csv", "text/csv")):
        answer = await browser.get(f"/comparisons/{comparison}/report.{suffix}")
        assert answer.headers["Content-Type"].startswith(kind)
        assert answer.headers["Content-Disposition"] == f'attachment; filename="{comparison}.{suffix}"'
        by_token = await client.get(f"/v1/comparisons/{comparison}/document?format={suffix}")
        assert by_token.headers["Content-Type"] == answer.headers["Content-Type"]
        assert re.sub(r"\s", "", by_token.text) == re.sub(r"\s", "", answer.text)
        assert HOSTILE not in answer.text.split("How to reproduce")[0]
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert len(rows) == 24
    found = json.loads((await browser.get(f"/comparisons/{comparison}/report.json")).text)
    assert found["conclusion"]["best"] == "norm=sync"
    assert (await browser.get(f"/comparisons/{comparison}/report.exe")).status_code == 422


async def test_pages_of_others_do_not_exist(browse, comparison):
    bob = await browse("bob")
    for path in ("", "/curves.json", "/report.html"):
        assert (await bob.get(f"/comparisons/{comparison}{path}")).status_code == 404
    assert (await bob.get("/comparisons/x")).status_code == 422


async def fail(*_):
    raise UpstreamRejected("MLflow: no")


@pytest.mark.parametrize("problem", ["down", "rejecting", "slow"])
async def test_a_page_without_mlflow_has_the_jobs_and_says_so(
    browser, comparison, mlflow, monkeypatch, problem
):
    mlflow.is_down = problem == "down"
    if problem == "rejecting":
        monkeypatch.setattr(mlflow, "curve", fail)
    if problem == "slow":
        monkeypatch.setattr("service.api.web.comparisons.REPORT_SECONDS", 0.1)
        monkeypatch.setattr(mlflow, "curve", lambda *_: asyncio.sleep(60))
    answer = await browser.get(f"/comparisons/{comparison}")
    assert answer.status_code == 200
    assert "<h1>does BN help</h1>" in answer.text
    assert "MLflow does not answer" in answer.text
    assert len(set(re.findall(r'href="/jobs/(job-[0-9a-f]+)"', answer.text))) == 6
    counts = re.findall(r'class="badge (?:queued|submitted)">\w+</span>\s*(\d)', answer.text)
    assert sum(map(int, counts)) == 6  # the dispatcher may have begun
    assert 'hx-trigger="every 15s"' in answer.text
    assert "report.html" not in answer.text


async def test_the_page_of_many_variants_is_small_and_leads_to_its_jobs(browser, client, app, ray, mlflow):
    ray.is_down = True
    rates = [0.001 * (number + 1) for number in range(40)]
    matrix = {"optimizer.lr": rates, "seed": [0, 1, 2]}
    body = BODY | {"matrix": matrix, "recipe": None}
    made = (await client.post("/v1/comparisons", json=body)).json()
    jobs = app.state.components.jobs
    for number, job in enumerate(made["jobs"]):
        run_id = f"run-of-{job['id']}"
        curve = [(step, 0.1 + step / 3e3 + number / 1e3) for step in range(0, 2001, 50)]
        mlflow.curves[run_id, "accuracy"] = curve
        mlflow.curves[run_id, "train_seconds"] = [(0, 1.0), (2000, 21.0)]
        async with asyncio.timeout(10):
            while await jobs.update_fields(await jobs.get(job["id"]), mlflow_run_id=run_id) is None:
                await asyncio.sleep(0.01)
    page = (await browser.get(f"/comparisons/{made['id']}")).text
    without_curves = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert len(without_curves) < 100_000
    assert f'href="/jobs?comparison={made["id"]}">All 120 jobs</a>' in page
    assert 'href="/jobs/job-' not in page
    assert "All numbers are in the CSV file" in page


async def test_a_comparison_without_data_has_a_page(browser, client):
    made = (await client.post("/v1/comparisons", json=BODY | {"target": None, "recipe": None})).json()
    page = (await browser.get(f"/comparisons/{made['id']}")).text
    assert "Cannot tell: the baseline has no data." in page
