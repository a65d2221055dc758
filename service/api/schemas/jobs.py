"""Schemas of jobs, except the JobSpec."""

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from service.api.schemas.names import Name
from service.domain.comparisons import Comparison
from service.domain.jobs import Event, JobRecord, JobState
from service.domain.retries import Blame, Retries
from service.domain.submission import SubmitOptions
from trainer.jobspec import FrozenModel, JobSpec, Progress


class SubmitJob(SubmitOptions):
    """Request for a new job."""

    name: Name
    spec: JobSpec


class ChangeJob(FrozenModel):
    """Request for a job from another one."""

    name: Name | None = Field(None, description="null: that of the other job")
    overrides: dict[str, JsonValue] = Field(
        {}, max_length=64, description="paths into the spec, such as `optimizer.lr`, and their new values"
    )


class Needs(BaseModel):
    """Resources that a job needs."""

    model_config = ConfigDict(from_attributes=True)

    cpus: float
    gpus: float


class Validation(BaseModel):
    """Resolved submission, and the resources that it needs."""

    jobs: int
    spec: JobSpec = Field(description="with all defaults; of a comparison, the base spec")
    least: Needs = Field(description="of one job, to start")
    most: Needs = Field(description="of one job, while it runs")
    fits: bool | None = Field(description="whether the cluster as it is now is large enough; null: Ray does not answer")
    warnings: list[str] = Field(description="fields that have no effect, or another one than their names suggest")


class JobSummaryView(BaseModel):
    """Job without its spec, as in lists."""

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
    norm: str = Field(description="of the spec")
    seed: int = Field(description="of the spec")
    steps: int = Field(description="of the spec")

    @classmethod
    def of(cls, job: JobRecord, mlflow_public_url: str) -> Self:
        """Show a job."""
        values = {
            name: getattr(job, name) for name in cls.model_fields if name not in ("mlflow_url", "failures", "tags")
        }
        return cls(
            **values, tags=list(job.tags), failures=job.failures.counts, mlflow_url=run_url(mlflow_public_url, job)
        )


class JobView(JobSummaryView):
    """Job."""

    spec: JobSpec


class JobList(BaseModel):
    """Page of jobs without their specs, newest first."""

    jobs: list[JobSummaryView]
    next_page_token: str | None = Field(description="pass it as `page_token` for the next page; null on the last one")


class EventView(BaseModel):
    """State change of a job, or a request about it."""

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
    """Timeline of a job."""

    events: list[EventView]


def run_url(base: str, of: JobRecord | Comparison) -> str | None:
    """Return the URL of a run in MLflow, or None."""
    if of.mlflow_run_id is None:
        return None
    return f"{base}/#/experiments/{of.mlflow_experiment_id}/runs/{of.mlflow_run_id}"
