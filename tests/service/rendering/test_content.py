import re

import pytest

from service.rendering.content import (
    LayerPercentiles,
    band_rows,
    effects_chart,
    metric_bands,
    metric_chart,
    natural_order,
    parse_percentiles,
    percentile_band,
    percentile_charts,
)
from service.rendering.series import band_of
from tests.service.domain.comparison_runs import FAST, SLOW, make_runs, report_of

SECONDS = [(0, 1.0), (100, 2.0), (2000, 21.0)]
REPORT = report_of(make_runs("none", SLOW, seconds=SECONDS), make_runs("sync", FAST, seconds=SECONDS))


def test_curves_over_steps_samples_and_seconds():
    steps, samples, seconds = (metric_bands(REPORT, x) for x in ("step", "samples", "seconds"))
    assert list(steps[0].x) == [0, 1800, 2000]
    assert list(samples[0].x) == [0, 108_000, 120_000]
    assert list(seconds[0].x) == pytest.approx([1.0, 19.0, 21.0])
    assert steps[0].mean == samples[0].mean == pytest.approx(seconds[0].mean)
    assert metric_bands(REPORT, smoothing=0.9)[0].mean != steps[0].mean


def test_charts_name_what_they_show():
    chart = metric_chart(REPORT, metric_bands(REPORT))
    assert 'aria-label="accuracy against step: mean and range over seeds of norm=none, norm=sync"' in chart
    intervals = effects_chart(REPORT)
    assert "times fewer steps than norm=none" in intervals
    assert 'class="s1"' in intervals  # the colour of its curve
    assert effects_chart(report_of(make_runs("none", SLOW))) is None


def test_the_axis_of_intervals_has_room_for_the_name_of_a_long_baseline():
    baseline = "none " + "x" * 60
    report = report_of(make_runs(baseline, SLOW), make_runs("sync", FAST), baseline={"norm": baseline})
    chart = effects_chart(report)
    (axis,) = re.findall(r">(times fewer steps[^<]*)</text>", chart)
    assert axis == "times fewer steps than norm=none xxxxxxxxxxxxxxx… (left of 1: more)"
    assert f"times fewer steps than norm={baseline} (left" in chart  # for readers who do not see it


def test_percentiles_need_all_three_metrics_of_a_unit():
    names = [f"probe/activation{n}/unit50/p{percent}" for n in (1, 3) for percent in (15, 50, 85)]
    assert parse_percentiles([*names, "probe/activation2/unit1/p50", "accuracy"]).keys() == {
        ("activation1", "50"),
        ("activation3", "50"),
    }
    assert sorted(["norm10", "norm9", "norm1"], key=natural_order) == ["norm1", "norm9", "norm10"]


def test_the_band_of_percentiles_is_around_the_median_and_has_a_common_axis():
    curves = {
        "15": [[(0, -1.0), (9, -2.0)], [(0, -2.0), (9, -3.0)]],
        "50": [[(0, 0.0), (9, 0.5)]],
        "85": [[(0, 1.0), (9, 2.0)]],
    }
    band = percentile_band("norm=none", curves)
    assert (band.low, band.mean, band.high) == ([-1.5, -2.5], [0.0, 0.5], [1.0, 2.0])
    wide = percentile_band("norm=none", curves)
    narrow = percentile_band("norm=sync", {percent: [[(0, 0.0), (9, 0.1)]] for percent in curves})
    charts = percentile_charts(LayerPercentiles(layer="a", unit="1", variants=[wide, narrow]))
    assert [label for label, _ in charts] == ["norm=none", "norm=sync"]
    assert all(">-2</text>" in chart for _, chart in charts)


def test_the_numbers_behind_a_chart():
    rows = band_rows(metric_bands(REPORT))
    assert rows[0] == ["0", "0.1", "0.1"]
    assert rows[-1][0] == "2,000"
    many = report_of(make_runs("none", {0: [(step, 0.5) for step in range(20_000)]}))
    rows = band_rows(metric_bands(many))
    assert len(rows) <= 200
    assert (rows[0][0], rows[-1][0]) == ("0", "19,999")


def test_many_series_have_fewer_rows_of_numbers_on_request():
    bands = [band_of(str(number), [[(step, 0.5) for step in range(100)]]) for number in range(40)]
    assert len(band_rows(bands)) == 100
    rows = band_rows(bands, max_cells=400)
    assert (len(rows) <= 10, rows[0][0], rows[-1][0]) == (True, "0", "99")
    assert len(band_rows(bands[:2], max_cells=400)) == 100
