"""Schemas of jobs, except the JobSpec."""

from datetime import UTC, datetime
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from service.api.schemas.names import Examples, Name
from service.domain.jobs import Job, JobState, JobSummary
from service.domain.mlflow_views import run_url
from service.domain.resources import Resources
from service.domain.retries import JobFailureKind, Retries, RetryGroup
from service.domain.submission import SubmitOptions
from trainer.jobspec import FrozenModel, JobSpec, Progress

SPEC: dict[str, Any] = {
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
"""Example of a spec."""


class SubmitJob(SubmitOptions):
    """Request for a new job."""

    EXAMPLES: ClassVar[Examples] = {
        "the paper's network on two workers": {"name": "first try", "spec": SPEC},
        "as little as can be said": {"name": "all defaults", "spec": {"steps": 500}},
        "two to four workers, with limits and retries": {
            "name": "digits, elastic",
            "priority": 10,
            "tags": ["team:vision", "nightly"],
            "retries": {"infrastructure": 2, "preempted": 20, "hang": 1},
            "queue_timeout_seconds": 86400,
            "max_run_seconds": 7200,
            "spec": {
                "model": {"name": "cnn", "channels": [16, 32]},
                "data": {"name": "digits"},
                "num_workers": [2, 4],
                "global_batch_size": 64,
                "steps": 5000,
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "lr_schedule": {"name": "cosine"},
                "early_stop": {"metric": "accuracy", "patience": 10},
                "checkpoint": {"every": 500, "keep_last": 3},
            },
        },
    }

    name: Name
    spec: JobSpec


class ChangeJob(FrozenModel):
    """Request for a job from another one."""

    EXAMPLES: ClassVar[Examples] = {
        "with other overrides": {
            "name": "second try",
            "overrides": {"steps": 4000, "checkpoint.keep_last": 3},
        },
    }

    name: Name | None = Field(None, description="null: that of the other job")
    overrides: dict[str, JsonValue] = Field(
        {}, max_length=64, description="paths into the spec, such as `optimizer.lr`, and their new values"
    )


class Validation(BaseModel):
    """Resolved submission, and the resources that it needs."""

    jobs: int = Field(examples=[1])
    spec: JobSpec = Field(description="with all defaults; of a comparison, the base spec")
    min_resources: Resources = Field(description="of one job, to start")
    max_resources: Resources = Field(description="of one job, while it runs")
    fits: bool | None = Field(
        examples=[True],
        description="whether the cluster as it is now is large enough; null: Ray does not answer",
    )
    warnings: list[str] = Field(
        examples=[[]],
        description="fields that have no effect, another one than their names suggest, or cost accuracy",
    )


class JobSummaryView(BaseModel):
    """Job without its spec, as in lists."""

    id: str = Field(examples=["job-3f9c2b7a10de"])
    name: str = Field(examples=["first try"])
    owner: str = Field(examples=["ann"])
    tags: list[str] = Field(examples=[[]])
    priority: int = Field(examples=[0])
    preemptible: bool = Field(description="whether a job of a higher priority may take its resources")
    retries: Retries
    secrets: dict[str, str] = Field(
        description="environment variables of the workers, to the names of their secrets"
    )
    queue_timeout_seconds: float | None
    max_run_seconds: float | None
    state: JobState = Field(examples=["running"])
    reason: str = Field(examples=["attempt 1 is running"], description="why the job is in this state")
    attempt: int = Field(examples=[1])
    failures: dict[RetryGroup, int] = Field(
        description="attempts that ended without a result, by the group whose retries they use"
    )
    failure_kind: JobFailureKind | None = Field(
        description="failure kind of the newest attempt that failed; null: none did, or the job succeeded"
    )
    cancel_requested: bool
    pause_requested: bool = Field(
        description="a queued job is paused; a running one saves a checkpoint, stops and is then paused"
    )
    preempted_by: str | None = Field(
        description="the job that took the resources of the newest attempt, or of the one before while the "
        "job is queued"
    )
    gpu_hours: float = Field(
        examples=[0.0],
        description="time of all attempts up to now, times the GPUs that the job may hold",
    )
    cpu_hours: float = Field(
        examples=[0.05],
        description="time of all attempts up to now, times the CPUs that the job may hold",
    )
    progress: Progress | None = Field(
        examples=[{"step": 800, "total_steps": 2000, "samples_per_second": 5200.0, "eta_seconds": 13.8}]
    )
    mlflow_run_id: str | None = Field(examples=["0d3f5c1b9a7e4f62"])
    mlflow_url: str | None = Field(
        examples=[
            "http://127.0.0.1:8000/mlflow/#/experiments/1/runs/0d3f5c1b9a7e4f62?workflowType=machine_learning"
        ]
    )
    comparison_id: str | None
    variant: dict[str, Any]
    resumed_from: str | None = Field(description="the ended job whose checkpoints this one continues from")
    cloned_from: str | None
    created_at: datetime = Field(examples=["2026-03-02T09:30:00Z"])
    started_at: datetime | None = Field(examples=["2026-03-02T09:30:09Z"])
    ended_at: datetime | None
    norm: str = Field(examples=["sync"], description="of the spec")
    seed: int = Field(examples=[0], description="of the spec")
    steps: int = Field(examples=[2000], description="of the spec")

    @classmethod
    def of(cls, job: Job | JobSummary, mlflow_public_url: str) -> Self:
        """Show a job."""
        values = {
            name: getattr(job, name)
            for name in cls.model_fields
            if name not in ("mlflow_url", "failures", "tags", "gpu_hours", "cpu_hours")
        }
        hours = job.seconds_run(datetime.now(UTC)) / 3600
        return cls(
            **values,
            tags=list(job.tags),
            failures=job.failures.counts,
            gpu_hours=hours * job.max_resources.gpus,
            cpu_hours=hours * job.max_resources.cpus,
            mlflow_url=run_url(mlflow_public_url, job),
        )


class JobView(JobSummaryView):
    """Job."""

    spec: JobSpec
    warnings: list[str] = Field(
        examples=[[]], description="fields of the spec that have no effect, or cost accuracy"
    )


class JobList(BaseModel):
    """Page of jobs without their specs, newest first."""

    jobs: list[JobSummaryView]
    next_page_token: str | None = Field(
        examples=["NDE"], description="pass it as `page_token` for the next page; null on the last one"
    )


class EventView(BaseModel):
    """State change of a job, or a request about it."""

    model_config = ConfigDict(from_attributes=True)

    sequence: int = Field(description="grows over all events")
    at: datetime
    state: JobState
    reason: str
    actor: str
    attempt: int


class EventList(BaseModel):
    """Timeline of a job."""

    events: list[EventView] = Field(
        examples=[
            [
                {
                    "sequence": sequence,
                    "at": at,
                    "state": state,
                    "reason": reason,
                    "actor": actor,
                    "attempt": 1,
                }
                for sequence, at, state, reason, actor in (
                    (41, "2026-03-02T09:30:00Z", "queued", "submitted by the user", "ann"),
                    (42, "2026-03-02T09:30:01Z", "submitted", "attempt 1 goes to Ray", "dispatcher"),
                    (43, "2026-03-02T09:30:09Z", "running", "attempt 1 is running", "dispatcher"),
                )
            ]
        ]
    )
