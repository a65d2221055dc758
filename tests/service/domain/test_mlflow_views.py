import base64
import json
import zlib
from dataclasses import replace

import pytest

from service.domain import mlflow_views
from service.domain.mlflow_views import (
    MAX_EXPERIMENT_TAG_CHARS,
    charted_metrics,
    comparison_url,
    experiment_note,
    home_url,
    plain,
    run_url,
    saved_view,
    view_tag,
)
from tests.service.domain.recipe_factory import FASTER, make_recipe
from tests.service.examples import make_comparison, make_job

BASE = "http://host/mlflow"


def state_of(value):
    packed = json.loads(value)["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_links_open_the_layout_for_training():
    placed = {"mlflow_run_id": "r", "mlflow_experiment_id": "7"}
    comparison = make_comparison(**placed)
    assert home_url(BASE) == f"{BASE}/#/experiments?workflowType=machine_learning"
    assert run_url(BASE, make_job()) is comparison_url(BASE, make_comparison()) is None
    assert run_url(BASE, make_job(**placed)) == f"{BASE}/#/experiments/7/runs/r?workflowType=machine_learning"
    assert comparison_url(BASE, comparison) == (
        f"{BASE}/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey={comparison.id}"
        "&compareRunsMode=CHART"
    )


@pytest.mark.parametrize(("installed", "supports"), [("3.17.9", True), ("3.18.0", False), ("3.1.0", False)])
def test_another_version_of_mlflow_gets_the_plain_link(monkeypatch, installed, supports):
    monkeypatch.setattr(mlflow_views, "version", lambda _: installed)
    mlflow_views.supports_views.cache_clear()
    try:
        comparison = make_comparison(mlflow_run_id="r", mlflow_experiment_id="7")
        plain_link = run_url(BASE, comparison)
        assert (comparison_url(BASE, comparison) != plain_link) is supports
    finally:
        mlflow_views.supports_views.cache_clear()


def test_a_view_has_one_chart_per_metric_that_matters_grouped_by_variant():
    comparison = make_comparison(metric="f1")
    value = saved_view(comparison, "parent")
    state = state_of(value)
    assert len(value) < 2_000
    assert json.loads(value)["createdAt"] == int(comparison.created_at.timestamp() * 1_000)
    assert view_tag(comparison) == f"mlflow.sharedViewState.{comparison.id}"
    charts = {chart["metricKey"]: chart["deleted"] for chart in state["compareRunCharts"]}
    assert [name for name, is_deleted in charts.items() if not is_deleted] == [
        "f1",
        "test_loss",
        "train_loss",
    ]
    # MLflow adds a chart for each metric without one.
    assert {"accuracy", "learning_rate", "train_seconds"} <= charts.keys()
    assert len(charts) == len(state["compareRunCharts"])
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "variant"}]
    assert state["searchFilter"] == "tags.`mlflow.parentRunId` = 'parent'"
    assert state["runsHidden"] == ["parent"]


def claim_of(*figures, **texts):
    recipe = make_recipe(FASTER, figures=figures).model_dump(mode="json", exclude={"name", "presets"})
    return recipe | texts


def test_the_metrics_of_a_claim_have_charts_too():
    drift = {"metric": "probe/norm1/mean_drift", "take": "mean"}
    comparison = make_comparison(
        recipe=claim_of({"label": "drift", "measure": drift, "of": {"norm": "sync"}})
    )
    assert charted_metrics(comparison) == ["accuracy", "test_loss", "train_loss", "probe/norm1/mean_drift"]
    many = [
        {"label": "x", "measure": {"metric": f"probe/layer{number}/shift", "take": "mean"}, "of": {}}
        for number in range(14)
    ]
    assert len(charted_metrics(make_comparison(recipe=claim_of(*many)))) == 8


def test_a_view_fits_into_its_tag(monkeypatch):
    monkeypatch.setattr(mlflow_views, "MAX_EXPERIMENT_TAG_CHARS", 1_300)
    long = replace(make_comparison(), name="n" * 200)
    value = saved_view(long, "parent")
    assert len(value) <= 1_300 < MAX_EXPERIMENT_TAG_CHARS
    assert state_of(value)["compareRunCharts"][0]["metricKey"] == "accuracy"


def test_the_note_of_an_experiment_is_one_line_without_markup_of_users():
    recipe = claim_of(claim="BN is <b>faster</b>\n\n# really")
    note = experiment_note(make_comparison(recipe=recipe))
    assert note.startswith(r"BN is \<b\>faster\</b\> \# really")
    assert "\n" not in note
    assert plain("[a](b) *c* & `d`") == r"\[a\](b) \*c\* \& \`d\`"
