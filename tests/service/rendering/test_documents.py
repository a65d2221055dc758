import csv
import io
import re

import yaml
from markupsafe import escape

from service.domain.comparisons import ComparisonSpec
from service.domain.reports import request_of
from service.domain.verdicts import finished_runs, judge
from service.rendering.content import LayerPercentiles, ReportContent, percentile_band
from service.rendering.documents import csv_file, html_file, markdown
from tests.service.domain.comparison_runs import FAST, SLOW, make_runs, report_of
from tests.service.domain.recipe_factory import FASTER, make_recipe

HOSTILE = "<script>alert(1)</script>"


def content(report=None, **changes):
    report = report or report_of(make_runs("none", SLOW), make_runs("sync", FAST))
    claim = make_recipe(FASTER)
    jobs = [run.job for result in report.variants for run in result.runs]
    curves = {run.job.id: run.metric for result in report.variants for run in result.runs}
    band = percentile_band("norm=none", {percent: [[(0, 0.0), (9, 1.0)]] for percent in ("15", "50", "85")})
    values = {
        "report": report,
        "claim": claim,
        "verdict": judge(claim, finished_runs(jobs, {"accuracy": curves})),
        "percentiles": [LayerPercentiles(layer="activation3", unit="50", variants=[band])],
        "environment": {"commit": "abc", "torch": "2.14"},
        "request": request_of(report),
        "page_url": "http://127.0.0.1:8000/comparisons/comparison-1",
        "mlflow_url": None,
    }
    return ReportContent(**(values | changes))


def test_a_html_file_has_the_whole_story_and_needs_no_network():
    text = html_file(content())
    for part in (
        "norm=sync is best: it needs 14.7 times fewer steps",
        "95 % interval",
        "Numbers of the chart",
        "Input of activation3, unit 50",
        "How to reproduce",
        "abc",
        "steps to 80 %, none / sync",
        "http://127.0.0.1:8000/comparisons/comparison-1",
    ):
        assert part in text
    assert text.count("<svg") >= 3
    assert "<script" not in text
    assert not re.search(r'(src|href)="http', text)
    assert "default-src 'none'" in text


def test_the_rule_of_the_verdict_is_not_folded_in_a_file():
    report = report_of(make_runs("none", SLOW), make_runs("sync", FAST))
    unfolded = re.sub(r"<details.*?</details>", "", html_file(content(report)), flags=re.DOTALL)
    assert f"Rule of the verdict: {escape(report.conclusion.rule)}" in unfolded


def test_markdown_has_tables_and_escapes_text_of_users():
    report = report_of(make_runs(f"{HOSTILE}|", SLOW), make_runs("sync", FAST))
    text = markdown(content(report))
    assert HOSTILE not in text.split("## How to reproduce")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") == rows[0].count("|") for line in rows[:4])
    assert "**The claim: not enough data.**" in text  # the claim is about norm=none


def test_html_escapes_text_of_users():
    report = report_of(make_runs(HOSTILE, SLOW), make_runs("sync", FAST))
    assert HOSTILE not in html_file(content(report))


def test_csv_has_a_row_per_point_and_no_formulas():
    rows = list(csv.DictReader(io.StringIO(csv_file(content()))))
    assert len(rows) == sum(map(len, [*SLOW.values(), *FAST.values()]))
    assert rows[0]["variant"] == "norm=none"
    assert float(rows[1]["accuracy"]) == 0.7
    report = report_of(make_runs("sync", SLOW))
    for result in report.variants:
        object.__setattr__(result, "label", "=1+1")
    assert "\n'=1+1," in csv_file(content(report))


def test_the_request_makes_the_same_comparison():
    body = yaml.safe_load(
        yaml.safe_dump(request_of(report_of(make_runs("none", SLOW), make_runs("sync", FAST))))
    )
    assert body["matrix"] == {"norm": ["none", "sync"], "seed": [0, 1]}
    known = {name: body[name] for name in ComparisonSpec.model_fields if name in body}
    assert ComparisonSpec.model_validate(known).baseline == {"norm": "none"}
