"""Results of a comparison's variants, and their effects against the baseline."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.domain.comparisons import Comparison, describe, without_seed
from service.domain.effects import KINDS, Effect, Measure, RunData, effect_of, measure
from service.domain.jobs import JobState, JobSummary
from service.domain.statistics import (
    Curve,
    Spread,
    default_target,
    finite_points,
    spread,
    up_to,
)
from trainer.jobspec import Direction, JobSpec, metric_direction

Verdict = Literal[
    "baseline",
    "faster",
    "slower",
    "cannot tell",
    "target not reached",
    "baseline without data",
    "runs failed",
    "not finished",
]
FASTER_OR_SLOWER: Mapping[str, Verdict] = {"better": "faster", "worse": "slower"}
PRIMARY: Measure = "steps_to_target"
"""Measure of the verdict."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run of a comparison with its curves."""

    job: JobSummary
    spec: JobSpec
    metric: Curve
    """The compared metric, as logged."""
    seconds: Curve = ()
    """Seconds of training by step."""

    @property
    def has_diverged(self) -> bool:
        """Return whether training or the metric became non-finite."""
        points = self.metric
        return self.job.failure_kind == "diverged" or bool(points and points[-1] not in finite_points(points))

    @property
    def has_failed(self) -> bool:
        """Return whether the run ended without a result; a divergence is a result."""
        return self.job.state in (JobState.FAILED, JobState.CANCELLED) and not self.has_diverged

    def data(self, last_step: int | None) -> RunData:
        """Return the finite points up to a step."""
        return RunData(
            metric=up_to(finite_points(self.metric), last_step),
            seconds=up_to(finite_points(self.seconds), last_step),
            batch_size=self.spec.global_batch_size,
            diverged=self.has_diverged,
        )


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """Results of a variant's runs."""

    variant: dict[str, Any]
    label: str
    runs: Sequence[Run]
    n: int
    """Number of runs with a curve."""
    reached: int
    """Number of runs that reached the target."""
    failed: int
    """Number of runs that failed or were cancelled; what they logged before counts as data."""
    diverged: int
    """Number of runs that diverged."""
    unfinished: int
    """Number of runs that have not ended."""
    measures: Mapping[Measure, Spread | None]
    """Median and range of each measure; of those to the target, over the runs that reached it."""
    effects: Mapping[Measure, Effect]
    """Effects against the baseline; none for the baseline."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Conditions under which the variants of a comparison are compared."""

    direction: Direction
    target: float | None
    last_step: int | None
    """Step up to which all runs are compared while some are unfinished; None: up to their ends."""

    def data(self, runs: Iterable[Run]) -> dict[int, RunData]:
        """Return the runs with data, by seed."""
        found = {run.job.seed: run.data(self.last_step) for run in runs}
        return {seed: run for seed, run in found.items() if run.metric}

    def effects(self, runs: Iterable[Run], reference: Iterable[Run]) -> dict[Measure, Effect]:
        """Return the effects of `runs` against `reference`."""
        ours, theirs = self.data(runs), self.data(reference)
        found = {name: effect_of(name, ours, theirs, self.target, self.direction) for name in KINDS}
        return {name: effect for name, effect in found.items() if effect is not None}


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by the label of their variant, in the order of the matrix."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(describe(without_seed(run.job.variant)), []).append(run)
    return groups


def make_setting(comparison: Comparison, groups: Mapping[str, Sequence[Run]]) -> Setting:
    """Return the direction, the target, and the last common step of unfinished runs."""
    direction = metric_direction(comparison.metric)
    unfinished = [run for runs in groups.values() for run in runs if not run.job.state.is_terminal]
    ends = [points[-1][0] for run in unfinished if (points := finite_points(run.metric))]
    setting = Setting(direction=direction, target=None, last_step=min(ends, default=None))
    target = comparison.target
    if target is None:
        runs = groups.get(describe(comparison.baseline), ())
        # A run that broke off early would lower the target to what it had reached by then.
        baseline = setting.data([run for run in runs if not (run.has_failed or run.has_diverged)] or runs)
        target = default_target({seed: run.metric for seed, run in baseline.items()}, direction)
    return Setting(direction=direction, target=target, last_step=setting.last_step)


def result_of(label: str, runs: Sequence[Run], baseline: Sequence[Run], setting: Setting) -> VariantResult:
    """Return the results of a variant's runs."""
    data = setting.data(runs)
    measured = {
        name: [
            bounds
            for run in data.values()
            if (bounds := measure(name, run, setting.target, setting.direction)) is not None
        ]
        for name in KINDS
    }
    known = {
        name: [low for low, high in bounds if low == high and math.isfinite(low)]
        for name, bounds in measured.items()
    }
    is_baseline = runs is baseline
    effects = {} if is_baseline else setting.effects(runs, baseline)
    counts = {
        "n": len(data),
        "reached": len(known[PRIMARY]),
        "failed": sum(run.has_failed for run in runs),
        "diverged": sum(run.has_diverged for run in runs),
        "unfinished": sum(not run.job.state.is_terminal for run in runs),
    }
    return VariantResult(
        variant=without_seed(runs[0].job.variant),
        label=label,
        runs=runs,
        **counts,
        measures={name: spread(values) for name, values in known.items()},
        effects=effects,
        verdict="baseline" if is_baseline else _verdict(effects.get(PRIMARY), **counts),
    )


def _verdict(
    effect: Effect | None, *, n: int, reached: int, failed: int, diverged: int, unfinished: int
) -> Verdict:
    if failed:
        return "runs failed"
    if unfinished and (n == 0 or reached < n):
        return "not finished"
    if effect is None:
        return "not finished" if unfinished else "baseline without data" if reached else "target not reached"
    return FASTER_OR_SLOWER.get(
        effect.outcome, "cannot tell" if reached or diverged else "target not reached"
    )
