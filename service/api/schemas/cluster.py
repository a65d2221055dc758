"""Schema of the cluster's resources."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from service.domain.jobs import JobState


class Resources(BaseModel):
    """Resources of the cluster."""

    model_config = ConfigDict(from_attributes=True)

    cpus: float
    gpus: float


class ClusterView(BaseModel):
    """Resources of Ray, and numbers of jobs."""

    total: Resources | None = Field(description="of all live nodes; null: Ray does not answer")
    free: Resources | None = Field(description="what nobody holds, as Ray saw it some seconds ago at most")
    jobs: dict[JobState, int] = Field(description="jobs of all owners by state")
    oldest_queued_at: datetime | None = Field(
        description="since when the first of the queue has waited; null: none does"
    )
