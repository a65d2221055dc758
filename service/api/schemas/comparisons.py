"""Schemas of comparisons."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from service.api.schemas.jobs import JobSummaryView, run_url
from service.api.schemas.names import Name
from service.domain.comparisons import Comparison, ComparisonSpec
from service.domain.jobs import JobRecord
from service.domain.submission import SubmitOptions


class SubmitComparison(ComparisonSpec, SubmitOptions):
    """One base spec under several variants."""

    name: Name


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
    jobs: list[JobSummaryView]

    @classmethod
    def of(cls, comparison: Comparison, jobs: Sequence[JobRecord], mlflow_public_url: str) -> "ComparisonView":
        """Show a comparison."""
        values = {name: getattr(comparison, name) for name in cls.model_fields if name not in ("jobs", "mlflow_url")}
        views = [JobSummaryView.of(job, mlflow_public_url) for job in jobs]
        return cls(**values, mlflow_url=run_url(mlflow_public_url, comparison), jobs=views)
