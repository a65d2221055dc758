"""Schemas of comparison reports and curves."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from service.api.schemas.verdicts import IntervalView
from service.domain import learning_rates
from service.domain.conclusions import RULE
from service.domain.effects import Effect, Kind, Measure, Outcome
from service.domain.jobs import JobState, JobSummary
from service.domain.reports import ComparisonReport, parameter_differences
from service.domain.statistics import Curve, finite_points
from service.domain.variants import PRIMARY, Run, VariantResult, Verdict
from trainer.jobspec import Direction


class SpreadView(BaseModel):
    """Median and range over seeds."""

    model_config = ConfigDict(from_attributes=True)

    median: float = Field(examples=[0.93])
    low: float = Field(examples=[0.93])
    high: float = Field(examples=[0.93])


class RunCurve(BaseModel):
    """Metric of a run by step."""

    job_id: str = Field(examples=["job-3f9c2b7a10de"])
    seed: int = Field(examples=[0])
    state: JobState = Field(examples=["succeeded"])
    points: list[tuple[int, float]] = Field(
        examples=[[(50, 0.71), (100, 0.81)]], description="finite values by step"
    )

    @classmethod
    def of(cls, job: JobSummary, points: Curve) -> "RunCurve":
        """Show the finite points of a run."""
        return cls(job_id=job.id, seed=job.seed, state=job.state, points=finite_points(points))


class Curves(BaseModel):
    """One metric of all runs of a comparison."""

    metric: str = Field(examples=["accuracy"])
    runs: list[RunCurve] = Field(description="without points where a run has no metric of that name")


class EffectView(BaseModel):
    """Effect of a variant on one measure, against the baseline, over paired seeds."""

    kind: Kind = Field(
        examples=["ratio"],
        description="ratio: the baseline's number over the variant's; difference: the variant's minus the "
        "baseline's",
    )
    seeds: int = Field(examples=[3], description="seeds that both have")
    estimate: IntervalView = Field(
        description="geometric mean of ratios, or mean of differences; different bounds if runs did not "
        "reach the target"
    )
    interval: IntervalView | None = Field(
        description="95 % interval over seeds; null: fewer than three seeds"
    )
    p_value: float | None = Field(
        examples=[0.25], description="of the exact paired permutation test; null: only bounds are known"
    )
    outcome: Outcome = Field(
        examples=["better"], description="better or worse: the interval excludes no difference"
    )
    more_seeds: int | None = Field(
        examples=[None],
        description="number of further seeds per variant that would decide the outcome with a probability of "
        "80 %",
    )

    @classmethod
    def of(cls, effect: Effect) -> "EffectView":
        """Show an effect."""
        return cls(
            kind=effect.kind,
            seeds=effect.seeds,
            estimate=IntervalView.of(effect.estimate),
            interval=effect.interval and IntervalView.of(effect.interval),
            p_value=effect.p_value,
            outcome=effect.outcome,
            more_seeds=effect.more_seeds,
        )


class VariantReport(BaseModel):
    """Results of one variant."""

    variant: dict[str, Any] = Field(examples=[{"norm": "sync"}])
    label: str = Field(examples=["norm=sync"])
    n: int = Field(examples=[3], description="runs with data")
    reached: int = Field(examples=[3], description="runs that reached the target")
    failed: int = Field(examples=[0], description="runs that failed or were cancelled")
    diverged: int = Field(examples=[0], description="runs whose training became non-finite")
    unfinished: int = Field(examples=[0], description="runs that have not ended")
    steps_to_target: SpreadView | None = Field(
        examples=[{"median": 100, "low": 100, "high": 100}], description="over the runs that reached it"
    )
    samples_to_target: SpreadView | None
    seconds_to_target: SpreadView | None = Field(description="seconds of training")
    best: SpreadView | None
    final: SpreadView | None
    area: SpreadView | None = Field(description="mean of the metric over steps (area under the curve)")
    seconds_per_step: SpreadView | None
    ratio: SpreadView | None = Field(
        examples=[{"median": 9.25, "low": 9.0, "high": 9.5}],
        description="steps of the baseline over steps of this variant, seed by seed",
    )
    ratio_is_at_least: bool = Field(
        description="the baseline did not always reach the target, so the ratio is a lower bound"
    )
    effects: dict[Measure, EffectView] = Field(description="by measure; none for the baseline")
    verdict: Verdict = Field(examples=["faster"], description=RULE)
    curves: list[RunCurve] | None = Field(examples=[None], description="only with `curves=true`")

    @classmethod
    def of(cls, result: VariantResult, *, with_curves: bool) -> "VariantReport":
        """Show a variant."""
        effect = result.effects.get(PRIMARY)
        return cls(
            variant=result.variant,
            label=result.label,
            n=result.n,
            reached=result.reached,
            failed=result.failed,
            diverged=result.diverged,
            unfinished=result.unfinished,
            **{
                name: spread and SpreadView.model_validate(spread) for name, spread in result.measures.items()
            },
            ratio=effect.spread and SpreadView.model_validate(effect.spread) if effect else None,
            ratio_is_at_least=effect is not None and effect.is_at_least,
            effects={name: EffectView.of(found) for name, found in result.effects.items()},
            verdict=result.verdict,
            curves=_curves(result.runs) if with_curves else None,
        )


def _curves(runs: Sequence[Run]) -> list[RunCurve]:
    return [RunCurve.of(run.job, run.metric) for run in runs]


class UsableRatesView(BaseModel):
    """Learning rates at which every run of a variant reached the target."""

    model_config = ConfigDict(from_attributes=True)

    label: str = Field(examples=["norm=sync"], description="the variant without its learning rate")
    tried: list[float] = Field(examples=[[0.1, 1.0, 10.0]])
    usable: list[float] = Field(examples=[[0.1, 1.0]])
    width: float | None = Field(examples=[10.0], description="greatest usable rate over the smallest")

    @classmethod
    def of(cls, rates: learning_rates.UsableRates) -> "UsableRatesView":
        """Show usable rates."""
        return cls.model_validate(rates)


class ConclusionView(BaseModel):
    """Conclusion of a comparison."""

    sentence: str = Field(
        examples=[
            "norm=sync is best: it needs 9.3 times fewer steps to accuracy ≥ 0.8 than norm=none (95 % "
            "interval 8.1 to 10.6, 3 seeds, exact permutation test p = 0.25)."
        ]
    )
    rule: str = Field(examples=[RULE])
    is_final: bool = Field(examples=[True], description="whether all runs have ended")
    best: str | None = Field(examples=["norm=sync"], description="null: the runs do not show a best variant")
    equal: list[str] = Field(examples=[[]], description="variants that cannot be distinguished from the best")
    subject: str | None = Field(
        examples=["norm=sync"], description="variant whose effect the sentence is about"
    )


class Report(BaseModel):
    """Report of a comparison."""

    comparison_id: str = Field(examples=["comparison-5b0e77c1d2aa"])
    name: str = Field(examples=["does BN help"])
    finished: bool = Field(
        examples=[True], description="whether all jobs have ended; until then figures may still change"
    )
    metric: str = Field(examples=["accuracy"])
    direction: Direction = Field(
        examples=["max"], description="which values of the metric are better: the largest or the smallest"
    )
    target: float | None = Field(examples=[0.8])
    target_is_given: bool = Field(
        examples=[True],
        description="false: the target is the best value that every run of the baseline reached",
    )
    last_step: int | None = Field(
        examples=[None],
        description="step up to which all runs are compared while some are unfinished; null: to their ends",
    )
    conclusion: ConclusionView
    warnings: list[str] = Field(examples=[[]], description="what to know before drawing conclusions")
    variants: list[VariantReport]
    usable_rates: list[UsableRatesView] = Field(
        examples=[[]], description="usable learning rates, if the matrix varies them"
    )
    differences: dict[str, list[Any]] = Field(
        examples=[{"norm": ["none", "sync"]}],
        description="fields of the specs that differ, with a value per variant",
    )

    @classmethod
    def of(cls, report: ComparisonReport, *, with_curves: bool) -> "Report":
        """Show a report."""
        comparison, conclusion = report.comparison, report.conclusion
        return cls(
            comparison_id=comparison.id,
            name=comparison.name,
            finished=report.finished,
            metric=comparison.metric,
            direction=report.setting.direction,
            target=report.setting.target,
            target_is_given=comparison.target is not None,
            last_step=report.setting.last_step,
            conclusion=ConclusionView(
                sentence=conclusion.sentence,
                rule=conclusion.rule,
                is_final=conclusion.is_final,
                best=conclusion.best,
                equal=list(conclusion.equal),
                subject=conclusion.subject,
            ),
            warnings=list(report.warnings),
            variants=[VariantReport.of(variant, with_curves=with_curves) for variant in report.variants],
            usable_rates=[UsableRatesView.of(rates) for rates in report.usable_rates],
            differences=parameter_differences(report),
        )
