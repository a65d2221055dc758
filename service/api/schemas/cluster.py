"""Schemas of the cluster's resources, usage, and health checks."""

from datetime import datetime

from pydantic import BaseModel, Field

from service.domain.jobs import JobState
from service.domain.resources import Resources


class ClusterView(BaseModel):
    """Resources of Ray, and numbers of jobs."""

    total: Resources | None = Field(description="of all live nodes; null: Ray does not answer")
    free: Resources | None = Field(
        examples=[{"cpus": 4, "gpus": 2}],
        description="what nobody holds, as Ray saw it some seconds ago at most",
    )
    jobs: dict[JobState, int] = Field(
        examples=[dict.fromkeys(JobState, 0) | {"queued": 3, "running": 2, "succeeded": 41, "failed": 1}],
        description="jobs of all owners by state",
    )
    oldest_queued_at: datetime | None = Field(
        examples=["2026-03-02T09:30:00Z"],
        description="since when the first of the queue has waited; null: none does",
    )


class Check(BaseModel):
    """Health of one dependency."""

    ok: bool = Field(examples=[True])
    detail: str = Field(examples=["answers"])


class Readiness(BaseModel):
    """Health of all dependencies."""

    ready: bool = Field(examples=[True])
    database: Check
    ray: Check
    mlflow: Check
    storage: Check = Field(description="whether the folder that is shared with the cluster can be written to")
    dispatcher: Check = Field(description="whether this replica reconciles jobs")


class UsageView(BaseModel):
    """Usage of an owner."""

    owner: str = Field(examples=["ann"])
    gpu_hours: float = Field(examples=[12.5])
    cpu_hours: float = Field(examples=[80.25])


class UsageList(BaseModel):
    """Usage by owner."""

    usage: list[UsageView]
