"""Content of a comparison's page and of its report files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from service.domain.effects import KINDS, NO_DIFFERENCE, Effect, Kind, Measure
from service.domain.recipes import Claim
from service.domain.reports import ComparisonReport
from service.domain.statistics import Curve
from service.domain.variants import PRIMARY
from service.domain.verdicts import RecipeVerdict
from service.rendering.series import Band, band_of, smoothed, thin, with_x
from service.rendering.svg import Frame, IntervalRow, curves_chart, intervals_chart, shortened

PERCENTILE = re.compile(r"^probe/(?P<layer>.+)/unit(?P<unit>\d+)/p(?P<percent>15|50|85)$")
PERCENTS = ("15", "50", "85")
MAX_ROWS, MIN_ROWS = 200, 4
XAxis = Literal["step", "samples", "seconds"]
X_LABELS: dict[XAxis, str] = {"step": "step", "samples": "samples", "seconds": "seconds of training"}


@dataclass(frozen=True, kw_only=True)
class LayerPercentiles:
    """Percentiles of the input of one unit, as in Figure 1 (b) and (c) of the paper."""

    layer: str
    unit: str
    variants: Sequence[Band]
    """Bands from the 15th to the 85th percentile around the median, each the mean over seeds."""


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Report of a comparison with all that its documents show."""

    report: ComparisonReport
    claim: Claim | None = None
    verdict: RecipeVerdict | None = None
    percentiles: Sequence[LayerPercentiles] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and commit of the service that makes the report."""
    request: Mapping[str, object] = field(default_factory=dict)
    """Body of POST /v1/comparisons that makes the same comparison."""
    page_url: str = ""
    mlflow_url: str | None = None


def parse_percentiles(names: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Group the names of percentile metrics by layer and unit, if all three exist."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        if found := PERCENTILE.match(name):
            groups.setdefault((found["layer"], found["unit"]), {})[found["percent"]] = name
    return {key: group for key, group in groups.items() if len(group) == len(PERCENTS)}


def natural_order(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers within texts by value: norm2 before norm10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def percentile_band(label: str, curves: Mapping[str, Sequence[Curve]]) -> Band:
    """Return the band of one variant from the curves of its runs, by percent."""
    low, middle, high = (band_of(label, curves[percent]) for percent in PERCENTS)
    common = min(len(band.x) for band in (low, middle, high))
    return Band(
        label=label,
        x=middle.x[:common],
        mean=middle.mean[:common],
        low=low.mean[:common],
        high=high.mean[:common],
    )


def metric_bands(report: ComparisonReport, x: XAxis = "step", smoothing: float = 0) -> list[Band]:
    """Return the curves of the compared metric, one band per variant.

    Against seconds, a band is placed at the mean time of its runs at each step.
    """
    bands = []
    for result in report.variants:
        band = band_of(result.label, [run.metric for run in result.runs])
        if smoothing:
            band = smoothed(band, smoothing)
        if x == "seconds":
            times = band_of("", [run.seconds for run in result.runs])
            band = with_x(
                band, [(int(step), seconds) for step, seconds in zip(times.x, times.mean, strict=True)]
            )
        elif x == "samples":
            size = result.runs[0].spec.global_batch_size
            band = replace(band, x=[step * size for step in band.x])
        bands.append(band)
    return bands


def metric_chart(report: ComparisonReport, bands: Sequence[Band], *, x: XAxis = "step", log: str = "") -> str:
    """Return the chart of the compared metric."""
    metric = report.comparison.metric
    labels = ", ".join(band.label for band in bands)
    return curves_chart(
        bands,
        Frame(
            title=f"{metric} against {X_LABELS[x]}: mean and range over seeds of {labels}",
            x_label=X_LABELS[x],
            y_label=metric,
            goal=report.setting.target,
            is_log_x="x" in log,
            is_log_y="y" in log,
        ),
    )


def effects_chart(report: ComparisonReport, measure: Measure = PRIMARY) -> str | None:
    """Return the chart of the effects on a measure, or None without effects."""
    found = {
        number: (result.label, result.effects[measure])
        for number, result in enumerate(report.variants)
        if measure in result.effects
    }
    if not found:
        return None
    kind = KINDS[measure]
    rows = [
        IntervalRow(label, estimate_of(effect), effect.interval, number)
        for number, (label, effect) in found.items()
    ]
    baseline = next(result.label for result in report.variants if result.verdict == "baseline")
    title = f"95 % intervals over seeds: {_axis_label(kind, baseline)}"
    label = _axis_label(kind, shortened(baseline))
    return intervals_chart(rows, title, label, NO_DIFFERENCE[kind], is_log=kind == "ratio")


def _axis_label(kind: Kind, baseline: str) -> str:
    if kind == "ratio":
        return f"times fewer steps than {baseline} (left of 1: more)"
    return f"difference from {baseline}"


def estimate_of(effect: Effect) -> float | None:
    """Return the known end of an estimate."""
    low, high = effect.estimate.low, effect.estimate.high
    if effect.kind == "ratio" and low == 0:
        return high if 0 < high < float("inf") else None
    return low


def percentile_charts(percentiles: LayerPercentiles) -> list[tuple[str, str]]:
    """Return a label and a chart per variant, with a common axis."""
    values = [value for band in percentiles.variants for value in (*band.low, *band.high)]
    return [
        (
            band.label,
            curves_chart(
                [band],
                Frame(
                    title=f"15th, 50th and 85th percentile of an input of {percentiles.layer}: {band.label}",
                    x_label="step",
                    y_label="input of the unit",
                    colours=[number],
                    y_values=values,
                ),
            ),
        )
        for number, band in enumerate(percentiles.variants)
    ]


def band_rows(bands: Sequence[Band], max_cells: int | None = None) -> list[list[str]]:
    """Return the numbers behind a chart as rows: x, then mean and range per series.

    With `max_cells`, many series have fewer rows.
    """
    max_rows = MAX_ROWS
    if max_cells is not None:
        max_rows = min(MAX_ROWS, max(MIN_ROWS, max_cells // max(1, len(bands))))
    places: dict[float, dict[int, str]] = {}
    for number, band in enumerate(bands):
        for x, mean, low, high in zip(band.x, band.mean, band.low, band.high, strict=True):
            text = f"{mean:.4g}" if low == high else f"{mean:.4g} ({low:.4g} to {high:.4g})"
            places.setdefault(x, {})[number] = text
    xs = sorted(places)
    if len(xs) > max_rows:
        kept = [int(x) for x, _ in thin([(number, 0.0) for number in range(len(xs))], max_rows)]
        xs = [xs[number] for number in kept]
    return [[f"{x:,.6g}", *(places[x].get(number, "–") for number in range(len(bands)))] for x in xs]
