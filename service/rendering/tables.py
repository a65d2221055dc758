"""Tables of reports and verdicts as text."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.domain.comparisons import describe
from service.domain.conclusions import describe_interval, goal_of
from service.domain.effects import Effect
from service.domain.recipes import Rule
from service.domain.reports import ComparisonReport, parameter_differences
from service.domain.statistics import Interval, Spread, spread
from service.domain.variants import PRIMARY, VariantResult
from service.domain.verdicts import Finding, RecipeVerdict

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Table of texts, whose first column names the rows."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float) -> str:
    """Return a number with three digits, or all of them and separators if it is large."""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def format_spread(values: Spread | None, form: Callable[[float], str] = number) -> str:
    """Return median and range: `0.93 (0.92 to 0.94)`."""
    if values is None:
        return NOTHING
    low, middle, high = (form(value) for value in (values.low, values.median, values.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def format_effect(effect: Effect | None) -> str:
    """Return estimate and interval: `9.3× (8.1 to 10.6)`, `+0.02 (0.01 to 0.03)`."""
    if effect is None:
        return NOTHING
    low, high = effect.estimate.low, effect.estimate.high
    sign, unit = ("", "×") if effect.kind == "ratio" else ("+", "")
    if low == high:
        text = f"{low:{sign}.3g}{unit}"
    elif math.isinf(high) and low > 0:
        text = f"≥ {low:.3g}{unit}"
    elif math.isfinite(high):
        text = f"≤ {high:.3g}{unit}"
    else:
        return NOTHING
    return text if effect.interval is None else f"{text} ({describe_interval(effect.interval)})"


def variants_table(report: ComparisonReport) -> Table:
    """Return the table of variants, with effects against the baseline."""
    metric, goal = report.comparison.metric, goal_of(report.comparison.metric, report.setting)
    columns: dict[str, Callable[[VariantResult], str]] = {
        "variant": lambda result: result.label,
        "verdict": lambda result: result.verdict,
        f"runs with {goal}": outcomes,
        "steps to target": lambda result: format_spread(result.measures[PRIMARY]),
        "ratio of steps": lambda result: format_effect(result.effects.get(PRIMARY)),
        "p": lambda result: _p_value(result.effects.get(PRIMARY)),
        f"best {metric}": lambda result: format_spread(result.measures["best"]),
        f"final {metric}": lambda result: format_spread(result.measures["final"]),
        "difference of final": lambda result: format_effect(result.effects.get("final")),
        "area": lambda result: format_spread(result.measures["area"]),
        "samples to target": lambda result: format_spread(result.measures["samples_to_target"]),
        "seconds to target": lambda result: format_spread(result.measures["seconds_to_target"]),
        "ms per step": lambda result: format_spread(
            result.measures["seconds_per_step"], lambda seconds: number(1_000 * seconds)
        ),
    }
    rows = [[cell(result) for cell in columns.values()] for result in report.variants]
    return Table(list(columns), rows)


def outcomes(result: VariantResult) -> str:
    """Describe the outcomes of a variant's runs: `3 of 3`, `2 of 3, 1 diverged`."""
    counts = {"failed": result.failed, "diverged": result.diverged, "unfinished": result.unfinished}
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    return ", ".join([f"{result.reached} of {result.n}", *parts])


def differences_table(report: ComparisonReport) -> Table:
    """Return the table of spec fields that differ among the variants."""
    rows = [
        [path, *(value if isinstance(value, str) else json.dumps(value) for value in values)]
        for path, values in parameter_differences(report).items()
    ]
    return Table(["field", *(result.label for result in report.variants)], rows)


def rates_table(report: ComparisonReport) -> Table:
    """Return the table of usable learning rates."""
    rows = [
        [
            rates.label,
            ", ".join(f"{rate:g}" for rate in rates.usable) or "none",
            NOTHING if rates.width is None else f"{rates.width:g}×",
            ", ".join(f"{rate:g}" for rate in rates.tried),
        ]
        for rates in report.usable_rates
    ]
    return Table(["variant", "usable learning rates", "greatest / smallest", "tried"], rows)


def findings_table(verdict: RecipeVerdict) -> Table:
    """Return the table of a claim's rules and figures."""
    headings = ["measured", "result", "95 % interval", "must be", "verdict"]
    return Table(headings, [_finding(finding) for finding in verdict.findings])


def _finding(finding: Finding) -> list[str]:
    figure = finding.figure
    known = [value.number for value in finding.values if value.number is not None]
    return [
        figure.label + (f" ({describe(finding.case)})" if finding.case else ""),
        _bounds(known),
        NOTHING if finding.interval is None else describe_interval(finding.interval),
        f"{figure.relation.replace('_', ' ')} {figure.bound:g}" if isinstance(figure, Rule) else "",
        finding.judgement or ("no significant difference" if finding.shows_no_difference else ""),
    ]


def _bounds(values: Sequence[Interval]) -> str:
    """Return median and range of numbers, of which some may be lower bounds."""
    found = spread([value.low for value in values if math.isfinite(value.low)])
    is_bound = any(value.low < value.high for value in values)
    return ("≥ " if is_bound and found else "") + format_spread(found)


def _p_value(effect: Effect | None) -> str:
    return NOTHING if effect is None or effect.p_value is None else f"{effect.p_value:.2g}"
