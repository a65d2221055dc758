"""Bodies of requests and answers, apart from JobSpec."""

from dataclasses import fields
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.config import JsonDict

from service.domain import reports
from service.domain.comparisons import Comparison, ComparisonSpec
from service.domain.jobs import Event, Job, JobState
from service.domain.retries import Blame, Retries
from service.domain.statistics import Verdict
from service.domain.terms import Terms
from trainer.spec import Frozen, JobSpec, Progress

Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=120,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._=,@+-]*$",
        description="letters, digits, spaces and ._=,@+- ; starts with a letter or digit",
    ),
]
EXAMPLE_SPEC: JsonDict = {
    "model": {"name": "mlp", "hidden": [100, 100, 100], "activation": "sigmoid", "init_std": 0.05},
    "data": {"name": "mnist5k"},
    "norm": "sync",
    "num_workers": 2,
    "global_batch_size": 60,
    "steps": 2000,
    "eval_every": 50,
    "optimizer": {"name": "sgd", "lr": 0.1},
    "seed": 0,
    "precision": "fp32",
}


class SubmitJob(Terms):
    """A job to run."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "first try", "spec": EXAMPLE_SPEC}]})

    name: Name
    spec: JobSpec


class ChangeJob(Frozen):
    """A new job after the example of another one."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "second try", "overrides": {"steps": 4000, "checkpoint.keep_last": 3}}]
        }
    )

    name: Name | None = Field(None, description="null: that of the other job")
    overrides: dict[str, JsonValue] = Field(
        {}, max_length=64, description="paths into the spec, such as `optimizer.lr`, and their new values"
    )


class Needs(BaseModel):
    """What a job takes of the cluster."""

    model_config = ConfigDict(from_attributes=True)

    cpus: float
    gpus: float


class Validation(BaseModel):
    """What would be stored, had it been submitted."""

    jobs: int
    spec: JobSpec = Field(description="with all defaults; of a comparison, the base spec")
    least: Needs = Field(description="of one job, to start")
    most: Needs = Field(description="of one job, while it runs")
    fits: bool | None = Field(description="whether the cluster as it is now is large enough; null: Ray does not answer")


class SubmitComparison(ComparisonSpec, Terms):
    """One base spec under several variants."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "does BN help",
                    "spec": EXAMPLE_SPEC,
                    "matrix": {"norm": ["none", "sync"], "optimizer.lr": [0.1, 0.5], "seed": [0, 1]},
                    "baseline": {"norm": "none", "optimizer.lr": 0.1},
                    "target": 0.8,
                }
            ]
        }
    )

    name: Name


class JobView(BaseModel):
    """A job as it stands."""

    id: str
    name: str
    owner: str
    tags: list[str]
    priority: int
    retries: Retries
    secrets: dict[str, str] = Field(description="environment variables of the workers, to the names of their secrets")
    queue_seconds: float | None
    run_seconds: float | None
    state: JobState
    reason: str = Field(description="why the job is in this state")
    attempt: int
    failures: dict[Blame, int] = Field(description="attempts that ended without a result, by whom that is blamed on")
    cancel_requested: bool
    progress: Progress | None
    mlflow_run_id: str | None
    mlflow_url: str | None
    comparison_id: str | None
    variant: dict[str, Any]
    resumed_from: str | None = Field(description="the ended job whose checkpoints this one goes on from")
    cloned_from: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    spec: JobSpec

    @classmethod
    def of(cls, job: Job, mlflow_public_url: str) -> "JobView":
        """Show a job."""
        values = {
            name: getattr(job, name) for name in cls.model_fields if name not in ("mlflow_url", "failures", "tags")
        }
        return cls(
            **values, tags=list(job.tags), failures=job.failures.counts, mlflow_url=_run_url(mlflow_public_url, job)
        )


class JobList(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[JobView]
    next_page_token: str | None = Field(description="pass it as `page_token` for the next page; null on the last one")


class EventView(BaseModel):
    """A transition of a job, or a wish about it."""

    sequence: int = Field(description="grows over all events")
    at: datetime
    state: JobState
    reason: str
    actor: str
    attempt: int

    @classmethod
    def of(cls, event: Event) -> "EventView":
        """Show an event."""
        return cls(**{name: getattr(event, name) for name in cls.model_fields})


class EventList(BaseModel):
    """A job's timeline."""

    events: list[EventView]


class ComparisonView(BaseModel):
    """A comparison and its jobs."""

    id: str
    name: str
    owner: str
    matrix: dict[str, list[Any]] = Field(description="with the names of variants, if there are any, as `variant`")
    baseline: dict[str, Any]
    metric: str
    target: float | None
    mlflow_url: str | None
    created_at: datetime
    jobs: list[JobView]

    @classmethod
    def of(cls, comparison: Comparison, jobs: list[Job], mlflow_public_url: str) -> "ComparisonView":
        """Show a comparison."""
        values = {name: getattr(comparison, name) for name in cls.model_fields if name not in ("jobs", "mlflow_url")}
        views = [JobView.of(job, mlflow_public_url) for job in jobs]
        return cls(**values, mlflow_url=_run_url(mlflow_public_url, comparison), jobs=views)


def _run_url(base: str, owner: Job | Comparison) -> str | None:
    if owner.mlflow_run_id is None:
        return None
    return f"{base}/#/experiments/{owner.mlflow_experiment_id}/runs/{owner.mlflow_run_id}"


class SpreadView(BaseModel):
    """Median and range over seeds."""

    model_config = ConfigDict(from_attributes=True)

    median: float
    low: float
    high: float


class RunCurve(BaseModel):
    """One run's metric by step."""

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
    """What one variant shows."""

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
    verdict: Verdict
    curves: list[RunCurve] | None = Field(description="only with `curves=true`")

    @classmethod
    def of(cls, report: reports.VariantReport, *, with_curves: bool) -> "VariantReport":
        """Show a variant."""
        shown = {field.name: getattr(report.result, field.name) for field in fields(report.result)}
        curves = [RunCurve.model_validate(curve) for curve in report.curves] if with_curves else None
        return cls(variant=report.variant, label=report.label, curves=curves, **shown)


class Report(BaseModel):
    """A comparison's table."""

    comparison_id: str
    name: str
    finished: bool = Field(description="whether all jobs have ended; until then figures may still change")
    metric: str
    target: float | None
    target_is_given: bool = Field(description="false: the target is the baseline's best, median over seeds")
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
            target=report.target,
            target_is_given=comparison.target is not None,
            variants=[VariantReport.of(variant, with_curves=with_curves) for variant in report.variants],
        )


class FieldError(BaseModel):
    """One field that cannot be taken."""

    field: str = Field(description="path into the body or name of the parameter")
    value: Any = Field(None, description="what was sent")
    takes: str


class Problem(BaseModel):
    """Problem details (RFC 9457), sent as `application/problem+json`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []


class Check(BaseModel):
    """State of one thing the service depends on."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """State of all things the service depends on."""

    ready: bool
    database: Check
    ray: Check
    mlflow: Check
    dispatcher: Check = Field(description="whether this replica looks after jobs")
