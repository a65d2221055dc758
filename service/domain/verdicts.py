"""Verdict of a recipe: holds, fails, cannot tell, or not enough data.

Each number is an interval, since a run that did not reach its level gives only a lower bound: at least its
own steps. A rule is judged by the 95 % interval of the mean over seeds (for ratios, of the geometric mean).
It holds if the whole interval satisfies the bound, fails if no part of it does, and is otherwise undecided
("cannot tell"). A recipe fails if a rule fails in any case, and holds if all rules hold in all cases.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from service.domain.comparisons import Variant, without_seed
from service.domain.jobs import JobState, JobSummary
from service.domain.recipes import Claim, Figure, Measure, Rule, Selection
from service.domain.statistics import Curve, Interval, mean_interval, steps_to_target
from trainer.jobspec import best_value, metric_direction

Judgement = Literal["holds", "fails", "cannot tell", "not enough data"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Finished run."""

    variant: Variant
    """Values of the matrix, without the seed."""
    seed: int
    curves: Mapping[str, Curve]
    """Curves by metric."""
    diverged: bool = False
    """Whether the run diverged; it has no final value then."""
    weights: Sequence[float] | None = None
    """Final weights and buffers, in a fixed order."""


UNKNOWN = Interval(-math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class Value:
    """Number of a figure for one case and seed; None if runs are missing."""

    seed: int
    number: Interval | None
    of: Interval | None = None
    against: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Figure in one case, such as one learning rate, over seeds."""

    figure: Figure
    case: Selection
    """Value of the figure's `each`; empty without one."""
    values: Sequence[Value]
    judgement: Judgement | None
    """Judgement of the rule; None for a figure without a rule."""
    interval: Interval | None = None
    """95 % interval of the mean over seeds (geometric for ratios); None with too few seeds or missing runs.
    """

    @property
    def shows_no_difference(self) -> bool:
        """Return whether the interval of a ratio or difference contains equality."""
        equal = {"ratio": 1.0, "difference": 0.0}.get(self.figure.by)
        return (
            equal is not None
            and self.interval is not None
            and self.interval.low <= equal <= self.interval.high
        )


@dataclass(frozen=True, kw_only=True)
class RecipeVerdict:
    """Verdict of a recipe's runs."""

    judgement: Judgement
    findings: Sequence[Finding]


def judge(claim: Claim, runs: Sequence[Run]) -> RecipeVerdict:
    """Return the verdict on a claim by the runs of a comparison.

    Some of the runs may be missing.
    """
    findings = [finding for figure in (*claim.verdict, *claim.figures) for finding in _find(figure, runs)]
    found = {finding.judgement for finding in findings}
    # The worst judgement decides; figures without a rule have the judgement None and do not count.
    order: tuple[Judgement, ...] = ("fails", "not enough data", "cannot tell")
    judgement: Judgement = next((one for one in order if one in found), "holds")
    return RecipeVerdict(judgement=judgement, findings=findings)


def select(selection: Selection, variants: Sequence[Variant], except_path: str | None = None) -> list[int]:
    """Return the indices of the variants that match a selection.

    They equal it in all paths except `except_path`.
    """
    return [
        place
        for place, variant in enumerate(variants)
        if {path: value for path, value in variant.items() if path != except_path} == selection
    ]


def finished_runs(jobs: Sequence[JobSummary], curves: Mapping[str, Mapping[str, Curve]]) -> list[Run]:
    """Return the runs of the jobs that succeeded.

    Args:
        jobs: jobs of a comparison.
        curves: curve of each metric and job, by metric and job id.
    """
    return [
        Run(
            variant=without_seed(job.variant),
            seed=job.seed,
            curves={metric: by_job[job.id] for metric, by_job in curves.items()},
            diverged=job.failure_kind == "diverged",
        )
        for job in jobs
        if job.state == JobState.SUCCEEDED
    ]


def _find(figure: Figure, runs: Sequence[Run]) -> list[Finding]:
    seeds = sorted({run.seed for run in runs})
    findings = []
    for case, of, against in figure.cases():
        values = [
            _value(figure, of, against, [run for run in runs if run.seed == seed], seed) for seed in seeds
        ]
        numbers = [value.number for value in values if value.number is not None]
        is_complete = bool(values) and len(numbers) == len(values)
        bounds = [(number.low, number.high) for number in numbers]
        # A missing run could change the mean in either direction, so an incomplete case has no interval.
        interval = mean_interval(bounds, is_ratio=figure.by == "ratio") if is_complete else None
        judgement = _judge(figure, interval, is_complete=is_complete) if isinstance(figure, Rule) else None
        findings.append(
            Finding(figure=figure, case=case, values=values, judgement=judgement, interval=interval)
        )
    return findings


def _judge(rule: Rule, interval: Interval | None, *, is_complete: bool) -> Judgement:
    if not is_complete:
        return "not enough data"
    held = None if interval is None else _holds(interval, rule)
    return "cannot tell" if held is None else "holds" if held else "fails"


def _holds(number: Interval, rule: Rule) -> bool | None:
    """Return whether a number is within the bound; None if it is undecided."""
    ends = (number.low, number.high)
    match rule.relation:
        case "above":
            held = [end > rule.bound for end in ends]
        case "at_least":
            held = [end >= rule.bound for end in ends]
        case "below":
            held = [end < rule.bound for end in ends]
        case "at_most":
            held = [end <= rule.bound for end in ends]
    # Relations are monotonic, so a bound that holds for both ends holds for the whole interval.
    return held[0] if held[0] == held[1] else None


def _value(figure: Figure, of: Selection, against: Selection, runs: Sequence[Run], seed: int) -> Value:
    """Return the measure of one seed's runs."""
    if figure.measure is None:
        return Value(seed=seed, number=_weight_difference(_single(of, runs), _single(against, runs)))
    one = _measure(figure.measure, of, runs)
    if figure.by == "value":
        return Value(seed=seed, number=one, of=one)
    other = _measure(figure.measure, against, runs)
    if one is None or other is None:
        return Value(seed=seed, number=None, of=one, against=other)
    number = (
        # Interval arithmetic: the lowest difference is between the lowest minuend and the highest subtrahend.
        _ratio(one, other) if figure.by == "ratio" else Interval(one.low - other.high, one.high - other.low)
    )
    return Value(seed=seed, number=number, of=one, against=other)


def _single(selection: Selection, runs: Sequence[Run]) -> Run | None:
    places = select(selection, [run.variant for run in runs])
    return runs[places[0]] if places else None


def _weight_difference(one: Run | None, other: Run | None) -> Interval | None:
    if one is None or other is None or one.weights is None or other.weights is None:
        return None
    difference = max(abs(a - b) for a, b in zip(one.weights, other.weights, strict=True))
    return Interval(difference, difference)


def _ratio(one: Interval, other: Interval) -> Interval:
    """Divide; 0/0 is 0, so that an empty window is not wider than another."""

    def divide(a: float, b: float) -> float:
        if b == 0:
            return math.inf if a > 0 else 0.0
        return 0.0 if math.isinf(b) else a / b

    return Interval(divide(one.low, other.high), divide(one.high, other.low))


def _measure(measure: Measure, selection: Selection, runs: Sequence[Run]) -> Interval | None:
    if measure.window is None:
        run = _single(selection, runs)
        return None if run is None else _of_run(measure, run, runs)
    window = measure.window
    chosen = [runs[place] for place in select(selection, [run.variant for run in runs], window.along)]
    # A named variant need not set the path of the window.
    chosen = [run for run in chosen if window.along in run.variant]
    if not chosen:
        return None
    inside = sorted(
        run.variant[window.along]
        for run in chosen
        if (value := _of_run(measure, run, runs)) is not None and value.low >= window.at_least
    )
    sizes = {
        "count": float(len(inside)),
        "lowest": inside[0] if inside else math.inf,
        "highest": inside[-1] if inside else 0.0,
        "width": inside[-1] / inside[0] if inside else 0.0,
    }
    return Interval(sizes[window.size], sizes[window.size])


def _of_run(measure: Measure, run: Run, runs: Sequence[Run]) -> Interval | None:
    curve = _curve(measure, run)
    values = [value for _, value in curve]
    if not values:
        return None
    if measure.take == "steps_to":
        return _steps_to(measure, curve, runs)
    if measure.take == "final" and run.diverged:
        # A diverged run has no final value, but may have any other measure up to its divergence.
        return UNKNOWN
    compute = {
        "final": lambda: values[-1],
        "max": lambda: max(values),
        "min": lambda: min(values),
        "mean": lambda: mean(values),
        "range": lambda: max(values) - min(values),
    }
    result = compute[measure.take]()
    return Interval(result, result)


def _curve(measure: Measure, run: Run) -> Curve:
    curve = run.curves.get(measure.metric, ())
    if measure.minus is not None:
        other = dict(run.curves.get(measure.minus, ()))
        # Metrics may be measured at different steps; only common steps have a difference.
        curve = [(step, value - other[step]) for step, value in curve if step in other]
    return [(step, value) for step, value in curve if step >= measure.from_step]


def _steps_to(measure: Measure, curve: Curve, runs: Sequence[Run]) -> Interval | None:
    direction = metric_direction(measure.metric)
    level: Any = measure.level
    if isinstance(level, dict):
        model = _single(level, runs)
        reached = [value for _, value in _curve(measure, model)] if model else []
        if not reached:
            return None
        level = best_value(reached, direction)
    steps = steps_to_target(curve, level, direction)
    # Step 0 counts as 1: a ratio needs a divisor.
    return (
        Interval(max(curve[-1][0], 1), math.inf) if steps is None else Interval(max(steps, 1), max(steps, 1))
    )
