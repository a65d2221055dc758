"""Tables of reports and verdicts, and plots of curves."""

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from service.api.schemas import Report, SpreadView, VariantReport
from service.domain.comparisons import describe
from service.domain.recipes import Recipe, Rule
from service.domain.statistics import spread
from service.domain.verdicts import Finding, Interval, RecipeVerdict


def report_table(report: Report) -> Table:
    """Table of variants."""
    target = "–" if report.target is None else f"{report.target:.3g}"
    sign = {"max": "≥", "min": "≤"}[report.direction]  # of the metric, once the target is reached
    origin = "" if report.target_is_given else " (the baseline's best)"
    table = Table(
        title=f"{escape(report.name)}: steps to {report.metric} {sign} {target}{origin}; median and range over seeds",
        caption=escape("\n".join(f"Warning: {warning}" for warning in report.warnings)) or None,
    )
    for heading in (
        "variant",
        "runs",
        f"steps to {target}",
        f"best {report.metric}",
        "final",
        "ratio of steps",
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


def verdict_table(recipe: Recipe, verdict: RecipeVerdict) -> Table:
    """Table of a recipe's rules and figures."""
    title = f"{recipe.name}: the claim {verdict.judgement}" if verdict.judgement in ("holds", "fails") else recipe.name
    caption = f"{escape(recipe.claim)} Falsified by {escape(recipe.falsified_if)}."
    table = Table(*FINDING_HEADINGS, title=f"{title}; median and range over seeds", caption=caption)
    for finding in verdict.findings:
        table.add_row(*map(escape, finding_cells(finding)))
    return table


FINDING_HEADINGS = ("measured", "first", "second", "result", "95 % interval", "must be", "verdict")


def finding_cells(finding: Finding) -> list[str]:
    """Return one finding as a row under `FINDING_HEADINGS`."""
    figure, values = finding.figure, finding.values
    has_sides = figure.by in ("ratio", "difference")
    return [
        figure.says + (f" ({describe(finding.case)})" if finding.case else ""),
        _intervals([value.of for value in values]) if has_sides else "",
        _intervals([value.against for value in values]) if has_sides else "",
        _intervals([value.number for value in values]),
        "–" if finding.interval is None else f"{finding.interval.low:.3g} to {finding.interval.high:.3g}",
        f"{figure.relation.replace('_', ' ')} {figure.bound:g}" if isinstance(figure, Rule) else "",
        finding.judgement
        or (f"no difference that {len(values)} seeds can show" if finding.shows_no_difference else ""),
    ]


def _intervals(values: Sequence[Interval | None]) -> str:
    """Format median and range; lower bounds are marked."""
    known = [value for value in values if value is not None]
    found = spread([value.low for value in known])
    if found is None:
        return "–"
    form = "{:,.0f}" if found.low >= 100 else "{:.3g}"
    shown = _spread(SpreadView.model_validate(found), form)
    return ("≥ " if any(value.high > value.low for value in known) else "") + shown


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
            axes.plot(steps, values, color=f"C{number}", alpha=0.8, label=variant.label if place == 0 else None)
    if report.target is not None:
        axes.axhline(report.target, color="grey", linestyle=":", label=f"target {report.target:.3g}")
    axes.set(xlabel="step", ylabel=report.metric, title=report.name)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right" if report.direction == "max" else "upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
