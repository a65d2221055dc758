"""Report of a comparison: each variant against the baseline, and the conclusion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.comparisons import SEED, VARIANT, Comparison, describe, warnings_of
from service.domain.conclusions import Conclusion, conclude
from service.domain.jobs import JobSummary
from service.domain.learning_rates import UsableRates, usable_rates
from service.domain.statistics import CONFIDENCE, MIN_SEEDS, Curve
from service.domain.variants import Run, Setting, VariantResult, group_runs, make_setting, result_of
from trainer.jobspec import JobSpec

MAX_CHANCE = 0.1
"""Chance of a false finding among all variants from which a report warns."""


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Report of a comparison."""

    comparison: Comparison
    finished: bool
    """Whether all jobs have ended."""
    setting: Setting
    conclusion: Conclusion
    warnings: Sequence[str]
    variants: Sequence[VariantResult]
    usable_rates: Sequence[UsableRates]
    """Usable learning rates, if the matrix varies them."""


def make_report(
    comparison: Comparison,
    jobs: Sequence[JobSummary],
    specs: Sequence[JobSpec],
    curves: Mapping[str, Curve],
    seconds: Mapping[str, Curve] | None = None,
) -> ComparisonReport:
    """Return the report of `jobs`, in matrix order.

    Args:
        comparison: the comparison.
        jobs: its jobs.
        specs: their specs, in the same order.
        curves: the compared metric by job id.
        seconds: seconds of training by step, by job id.
    """
    seconds = seconds or {}
    groups = group_runs(
        Run(job=job, spec=spec, metric=curves[job.id], seconds=seconds.get(job.id, ()))
        for job, spec in zip(jobs, specs, strict=True)
    )
    setting = make_setting(comparison, groups)
    baseline = groups.get(describe(comparison.baseline), [])
    variants = [result_of(label, runs, baseline, setting) for label, runs in groups.items()]
    finished = all(job.state.is_terminal for job in jobs)
    return ComparisonReport(
        comparison=comparison,
        finished=finished,
        setting=setting,
        conclusion=conclude(comparison, variants, setting, finished=finished),
        warnings=[
            *warnings_of(specs),
            *_warnings_about_seeds(max(map(len, groups.values()))),
            *_warnings_about_variants(len(groups) - 1),
        ],
        variants=variants,
        usable_rates=usable_rates(variants),
    )


def _warnings_about_seeds(seeds: int) -> list[str]:
    """Return the warning that too few seeds give no verdict."""
    if seeds >= MIN_SEEDS:
        return []
    return [f"seed: a verdict needs at least {MIN_SEEDS} seeds per variant (got {seeds})"]


def _warnings_about_variants(count: int) -> list[str]:
    """Return the warning that many variants find differences by chance."""
    chance = 1 - (1 - (1 - CONFIDENCE) / 2) ** count
    if chance < MAX_CHANCE:
        return []
    return [
        f"variants: {count} variants are compared with the baseline, each at {CONFIDENCE:.0%}; without any "
        f"difference, one of them would be called faster by chance in about {chance:.0%} of comparisons"
    ]


def setup_of(report: ComparisonReport) -> str:
    """Describe what the runs of the baseline train, in words."""
    spec = report.variants[0].runs[0].spec
    workers = "-".join(map(str, sorted({spec.min_workers, spec.max_workers})))
    return (
        f"{spec.model.name} on {spec.data.name}, {spec.steps:,} steps, {workers} "
        f"worker{'' if workers == '1' else 's'}, {spec.global_batch_size:,} samples per step, "
        f"{spec.optimizer.name} with a learning rate of {spec.optimizer.lr:g}"
    )


def parameter_differences(report: ComparisonReport) -> dict[str, list[Any]]:
    """Return the fields of the specs that differ, with a value per variant."""
    specs = [result.runs[0].spec.model_dump(mode="json", exclude={"seed"}) for result in report.variants]
    return differences_of(specs)


def differences_of(values: Sequence[Any], path: str = "") -> dict[str, list[Any]]:
    """Return the paths at which values differ, with all values there.

    Objects with other fields differ as a whole.
    """
    first = values[0]
    if all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
        return {
            inner: found
            for key in first
            for inner, found in differences_of(
                [value[key] for value in values], f"{path}.{key}" if path else key
            ).items()
        }
    return {path: list(values)} if any(value != first for value in values) else {}


def request_of(report: ComparisonReport) -> dict[str, Any]:
    """Return the body of POST /v1/comparisons that makes the same comparison."""
    comparison = report.comparison
    # Without an axis for it, the seed is a field of the spec like any other.
    without = {SEED} if SEED in comparison.matrix else set()
    spec = report.variants[0].runs[0].spec.model_dump(mode="json", exclude=without)
    body: dict[str, Any] = {
        "name": comparison.name,
        "spec": spec,
        "matrix": {path: values for path, values in comparison.matrix.items() if path != VARIANT},
        "baseline": comparison.baseline,
        "metric": comparison.metric,
    }
    if comparison.target is not None:
        body["target"] = comparison.target
    if comparison.recipe is not None:
        body["recipe"] = comparison.recipe
    if VARIANT in comparison.matrix:
        paths = parameter_differences(report)
        body["variants"] = {
            str(result.variant[VARIANT]): {
                path: values[place] for path, values in paths.items() if path not in body["matrix"]
            }
            for place, result in enumerate(report.variants)
        }
    return body
