"""Schemas of comparison reports and curves."""

from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from service.domain import reports
from service.domain.jobs import JobState
from service.domain.statistics import Verdict
from trainer.jobspec import Direction


class SpreadView(BaseModel):
    """Median and range over seeds."""

    model_config = ConfigDict(from_attributes=True)

    median: float
    low: float
    high: float


class RunCurve(BaseModel):
    """Metric of a run by step."""

    model_config = ConfigDict(from_attributes=True)

    job_id: str
    seed: int
    state: JobState
    points: list[tuple[int, float]]


class Curves(BaseModel):
    """One metric of all runs of a comparison."""

    metric: str
    runs: list[RunCurve] = Field(description="without points where a run has no metric of that name")


class VariantReport(BaseModel):
    """Results of one variant."""

    variant: dict[str, Any]
    label: str
    n: int = Field(description="runs with data")
    reached: int = Field(description="runs that reached the target")
    failed: int = Field(description="runs that failed or were cancelled")
    steps_to_target: SpreadView | None = Field(description="over the runs that reached it")
    best: SpreadView | None
    final: SpreadView | None
    ratio: SpreadView | None = Field(description="steps of the baseline over steps of this variant, seed by seed")
    ratio_is_at_least: bool = Field(
        description="the baseline did not always reach the target, so the ratio is a lower bound"
    )
    verdict: Verdict = Field(
        description="faster or slower: the ratio's 95 % t interval (geometric mean, over seeds) is above or below 1; "
        "no clear difference: it contains 1, or there are only two seeds"
    )
    curves: list[RunCurve] | None = Field(description="only with `curves=true`")

    @classmethod
    def of(cls, report: reports.VariantReport, *, with_curves: bool) -> "VariantReport":
        """Show a variant."""
        shown = {field.name: getattr(report.result, field.name) for field in fields(report.result)}
        curves = [RunCurve.model_validate(curve) for curve in report.curves] if with_curves else None
        return cls(variant=report.variant, label=report.label, curves=curves, **shown)


class Report(BaseModel):
    """Report of a comparison."""

    comparison_id: str
    name: str
    finished: bool = Field(description="whether all jobs have ended; until then figures may still change")
    metric: str
    direction: Direction = Field(description="which values of the metric are better: the largest or the smallest")
    target: float | None
    target_is_given: bool = Field(description="false: the target is the baseline's best, median over seeds")
    warnings: list[str] = Field(description="what to know before drawing conclusions")
    variants: list[VariantReport]

    @classmethod
    def of(cls, report: reports.ComparisonReport, *, with_curves: bool) -> "Report":
        """Show a report."""
        comparison = report.comparison
        return cls(
            comparison_id=comparison.id,
            name=comparison.name,
            finished=report.finished,
            metric=comparison.metric,
            direction=report.direction,
            target=report.target,
            target_is_given=comparison.target is not None,
            warnings=list(report.warnings),
            variants=[VariantReport.of(variant, with_curves=with_curves) for variant in report.variants],
        )
