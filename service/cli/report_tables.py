"""Tables of reports and verdicts, and plots of curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from service.api.schemas import FindingView, IntervalView, Report, SpreadView, VariantReport, VerdictView
from service.domain.comparisons import describe
from service.domain.recipes import Rule
from service.domain.statistics import Curve, spread, value_at
from service.domain.variants import PRIMARY

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40


def report_lines(report: Report) -> Group:
    """Conclusion, and table of variants."""
    return Group(Text(report.conclusion.sentence, style="bold"), "", report_table(report))


def watched(report: Report) -> Group:
    """Conclusion, table of variants, and their curves as sparklines."""
    curves = {
        variant.label: [run.points for run in variant.curves or [] if run.points]
        for variant in report.variants
    }
    values = [value for runs in curves.values() for points in runs for _, value in points]
    last = max((points[-1][0] for runs in curves.values() for points in runs), default=0)
    lines = Table(report.metric, "mean over seeds", "last", box=None, header_style="dim")
    for label, runs in curves.items():
        means = [_mean_at(runs, last * place // (SPARK_WIDTH - 1)) for place in range(SPARK_WIDTH)]
        bars = sparkline(means, min(values, default=0), max(values, default=1))
        lines.add_row(escape(label), bars, f"{mean(points[-1][1] for points in runs):.3f}" if runs else "–")
    return Group(report_lines(report), "", lines)


def _mean_at(runs: Sequence[Curve], step: int) -> float | None:
    found = [value for points in runs if (value := value_at(points, step)) is not None]
    return mean(found) if found else None


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """Return a line of bars from `low` to `high`; a space where there is no value."""
    width = (high / 2 - low / 2) or 1.0  # halves, whose difference is finite
    places = (
        None if value is None else round((value / 2 - low / 2) / width * (len(BARS) - 1)) for value in values
    )
    return "".join(" " if place is None else BARS[place] for place in places)


def report_table(report: Report) -> Table:
    """Table of variants."""
    target = "–" if report.target is None else f"{report.target:.3g}"
    sign = {"max": "≥", "min": "≤"}[report.direction]  # of the metric, once the target is reached
    origin = "" if report.target_is_given else " (the baseline's best)"
    table = Table(
        title=f"{escape(report.name)}: steps to {report.metric} {sign} {target}{origin}; median and range "
        "over seeds",
        caption=escape("\n".join(f"Warning: {warning}" for warning in report.warnings)) or None,
    )
    for heading in (
        "variant",
        "runs",
        f"steps to {target}",
        f"best {report.metric}",
        "final",
        "ratio of steps",
        "95 % interval",
        "verdict",
    ):
        table.add_column(heading, justify="left" if heading in ("variant", "verdict") else "right")
    for variant in report.variants:
        table.add_row(
            escape(variant.label),
            f"{variant.reached} of {variant.n}" + (f", {variant.failed} failed" if variant.failed else ""),
            _spread(variant.steps_to_target, "{:,.0f}"),
            _spread(variant.best, "{:.3f}"),
            _spread(variant.final, "{:.3f}"),
            _ratio(variant),
            _interval_of_ratio(variant),
            variant.verdict,
        )
    return table


def _spread(spread: SpreadView | None, form: str) -> str:
    if spread is None:
        return "–"
    low, middle, high = (form.format(value) for value in (spread.low, spread.median, spread.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def _ratio(variant: VariantReport) -> str:
    return ("≥ " if variant.ratio_is_at_least else "") + _spread(variant.ratio, "{:.1f}×")


def _interval_of_ratio(variant: VariantReport) -> str:
    effect = variant.effects.get(PRIMARY)
    return "–" if effect is None or effect.interval is None else _interval(effect.interval)


def verdict_table(name: str, verdict: VerdictView) -> Table:
    """Table of a claim's rules and figures."""
    title = f"{name}: the claim {verdict.judgement}" if verdict.judgement in ("holds", "fails") else name
    caption = f"{verdict.claim} Falsified if {verdict.falsified_if}."
    table = Table(
        *FINDING_HEADINGS, title=f"{escape(title)}; median and range over seeds", caption=escape(caption)
    )
    for finding in verdict.findings:
        table.add_row(*map(escape, finding_cells(finding)))
    return table


FINDING_HEADINGS = ("measured", "first", "second", "result", "95 % interval", "must be", "verdict")


def finding_cells(finding: FindingView) -> list[str]:
    """Return one finding as a row under `FINDING_HEADINGS`."""
    figure, values = finding.figure, finding.values
    has_sides = figure.by in ("ratio", "difference")
    return [
        figure.label + (f" ({describe(finding.case)})" if finding.case else ""),
        _intervals([value.first for value in values]) if has_sides else "",
        _intervals([value.second for value in values]) if has_sides else "",
        _intervals([value.number for value in values]),
        "–" if finding.interval is None else _interval(finding.interval),
        f"{figure.relation.replace('_', ' ')} {figure.bound:g}" if isinstance(figure, Rule) else "",
        finding.judgement
        or (f"no significant difference ({len(values)} seeds)" if finding.shows_no_difference else ""),
    ]


def _interval(interval: IntervalView) -> str:
    low, high = interval.low, interval.high
    return f"{-math.inf if low is None else low:.3g} to {math.inf if high is None else high:.3g}"


def _intervals(values: Sequence[IntervalView | None]) -> str:
    """Format median and range; lower bounds are marked."""
    known = [value for value in values if value is not None]
    found = spread([-math.inf if value.low is None else value.low for value in known])
    if found is None:
        return "–"
    # Large numbers are step counts.
    form = "{:,.0f}" if found.low >= 100 else "{:.3g}"
    shown = _spread(SpreadView.model_validate(found), form)
    return ("≥ " if any(value.high != value.low for value in known) else "") + shown


def save_plot(report: Report, path: Path) -> None:
    """Plot the metric against steps: a line per run, a colour per variant.

    As in Ioffe & Szegedy 2015, Figure 1 (a).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, variant in enumerate(report.variants):
        for place, run in enumerate(variant.curves or []):
            steps, values = zip(*run.points, strict=True) if run.points else ((), ())
            axes.plot(
                steps, values, color=f"C{number}", alpha=0.8, label=variant.label if place == 0 else None
            )
    if report.target is not None:
        axes.axhline(report.target, color="grey", linestyle=":", label=f"target {report.target:.3g}")
    axes.set(xlabel="step", ylabel=report.metric, title=report.name)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right" if report.direction == "max" else "upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
