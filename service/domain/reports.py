"""A comparison's report: its variants, each measured against the baseline; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.comparisons import Comparison, Variant, describe, without_seed
from service.domain.jobs import Job, JobState
from service.domain.statistics import Curve, VariantResult, compare, default_target


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """One run's metric by step."""

    job_id: str
    seed: int
    state: JobState
    points: Curve


@dataclass(frozen=True, kw_only=True)
class VariantReport:
    """What one variant shows."""

    variant: dict[str, Any]
    label: str
    result: VariantResult
    curves: Sequence[RunCurve]


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """What a comparison shows."""

    comparison: Comparison
    finished: bool
    """Whether all jobs have ended."""
    target: float | None
    variants: Sequence[VariantReport]


def make_report(comparison: Comparison, jobs: Sequence[Job], curves: Mapping[str, Curve]) -> ComparisonReport:
    """Measure each variant of `jobs` by their `curves` (by job id), in the order of the matrix."""
    groups: list[tuple[Variant, dict[int, Job]]] = []
    for job in jobs:
        variant = without_seed(job.variant)
        runs = next((runs for known, runs in groups if known == variant), None)
        if runs is None:
            groups.append((variant, {job.spec.seed: job}))
        else:
            runs[job.spec.seed] = job
    by_seed = {describe(variant): {seed: curves[job.id] for seed, job in runs.items()} for variant, runs in groups}
    baseline = by_seed.get(describe(comparison.baseline), {})
    target = comparison.target if comparison.target is not None else default_target(baseline)
    variants = [
        VariantReport(
            variant=variant,
            label=describe(variant),
            result=compare(by_seed[describe(variant)], baseline, target, is_baseline=variant == comparison.baseline),
            curves=[
                RunCurve(job_id=job.id, seed=seed, state=job.state, points=curves[job.id]) for seed, job in runs.items()
            ],
        )
        for variant, runs in groups
    ]
    return ComparisonReport(
        comparison=comparison, finished=all(job.state.is_terminal for job in jobs), target=target, variants=variants
    )
