"""Report of a comparison: each variant against the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.comparisons import Comparison, Variant, describe, warnings_of, without_seed
from service.domain.jobs import JobState, JobSummary
from service.domain.statistics import MIN_SEEDS, Curve, VariantResult, compare, default_target
from trainer.jobspec import Direction, JobSpec, metric_direction


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """Metric of a run by step."""

    job_id: str
    seed: int
    state: JobState
    points: Curve


@dataclass(frozen=True, kw_only=True)
class VariantReport:
    """Results of a variant."""

    variant: dict[str, Any]
    label: str
    result: VariantResult
    curves: Sequence[RunCurve]


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Report of a comparison."""

    comparison: Comparison
    finished: bool
    """Whether all jobs have ended."""
    direction: Direction
    """Which values of the comparison's metric are better."""
    target: float | None
    warnings: Sequence[str]
    variants: Sequence[VariantReport]


def make_report(
    comparison: Comparison, jobs: Sequence[JobSummary], specs: Sequence[JobSpec], curves: Mapping[str, Curve]
) -> ComparisonReport:
    """Return the report of `jobs` with `specs` and `curves` (by job id), in matrix order."""
    groups: dict[str, tuple[Variant, dict[int, JobSummary]]] = {}
    for job in jobs:
        variant = without_seed(job.variant)
        groups.setdefault(describe(variant), (variant, {}))[1][job.seed] = job
    by_seed = {label: {seed: curves[job.id] for seed, job in runs.items()} for label, (_, runs) in groups.items()}
    baseline_label = describe(comparison.baseline)
    baseline = by_seed.get(baseline_label, {})
    direction = metric_direction(comparison.metric)
    target = comparison.target if comparison.target is not None else default_target(baseline, direction)
    variants = [
        VariantReport(
            variant=variant,
            label=label,
            result=compare(
                by_seed[label],
                baseline,
                target,
                is_baseline=label == baseline_label,
                direction=direction,
                failed=sum(job.state in (JobState.FAILED, JobState.CANCELLED) for job in runs.values()),
                unfinished=sum(not job.state.is_terminal for job in runs.values()),
            ),
            curves=[
                RunCurve(job_id=job.id, seed=seed, state=job.state, points=curves[job.id]) for seed, job in runs.items()
            ],
        )
        for label, (variant, runs) in groups.items()
    ]
    return ComparisonReport(
        comparison=comparison,
        finished=all(job.state.is_terminal for job in jobs),
        direction=direction,
        target=target,
        warnings=[*warnings_of(specs), *_warnings_about_seeds(max(len(runs) for _, runs in groups.values()))],
        variants=variants,
    )


def _warnings_about_seeds(seeds: int) -> list[str]:
    """Return the warning that two seeds are too few for a verdict."""
    return [f"seed: faster and slower take at least {MIN_SEEDS} seeds (got {seeds})"] if 1 < seeds < MIN_SEEDS else []
