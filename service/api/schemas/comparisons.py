"""Schemas of comparisons."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from service.api.schemas.jobs import SPEC, JobSummaryView
from service.api.schemas.names import Examples, Name
from service.domain.comparisons import Comparison, ComparisonSpec
from service.domain.jobs import Job, JobState, JobSummary
from service.domain.mlflow_views import comparison_url
from service.domain.recipes import Claim
from service.domain.submission import SubmitOptions


class SubmitComparison(ComparisonSpec, SubmitOptions):
    """One base spec under several variants."""

    EXAMPLES: ClassVar[Examples] = {
        "with and without synchronised statistics": {
            "name": "does BN help",
            "spec": SPEC,
            "matrix": {"norm": ["none", "sync"], "optimizer.lr": [0.1, 0.5], "seed": [0, 1]},
            "baseline": {"norm": "none", "optimizer.lr": 0.1},
            "target": 0.8,
        },
        "variants that change several fields": {
            "name": "faster with BN",
            "spec": SPEC,
            "variants": {"plain": {"norm": "none"}, "bn-x5": {"norm": "sync", "optimizer.lr": 0.5}},
            "matrix": {"seed": [0, 1, 2]},
            "baseline": {"variant": "plain"},
        },
    }

    name: Name
    recipe: Claim | None = Field(
        None, description="claim and rules by which the runs are judged; null: no verdict"
    )


class ComparisonFields(BaseModel):
    """Fields of a comparison, alone and in lists."""

    id: str = Field(examples=["comparison-5b0e77c1d2aa"])
    name: str = Field(examples=["does BN help"])
    owner: str = Field(examples=["ann"])
    matrix: dict[str, list[Any]] = Field(
        examples=[{"norm": ["none", "sync"], "seed": [0, 1]}],
        description="with the names of variants, if there are any, as `variant`",
    )
    baseline: dict[str, Any] = Field(examples=[{"norm": "none"}])
    metric: str = Field(examples=["accuracy"])
    target: float | None = Field(examples=[0.8])
    mlflow_url: str | None = Field(
        examples=[
            "http://127.0.0.1:8000/mlflow/#/experiments/1/runs?workflowType=machine_learning"
            "&viewStateShareKey=comparison-5b0e77c1d2aa&compareRunsMode=CHART"
        ]
    )
    created_at: datetime = Field(examples=["2026-03-02T09:30:00Z"])


class ComparisonView(ComparisonFields):
    """A comparison and its jobs."""

    recipe: Claim | None = Field(
        examples=[None], description="claim and rules by which the runs are judged; null: no verdict"
    )
    warnings: list[str] | None = Field(
        None, examples=[None], description="of the submission, in its answer alone; later in the report"
    )
    jobs: list[JobSummaryView]

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        jobs: Sequence[Job | JobSummary],
        mlflow_public_url: str,
        warnings: list[str] | None = None,
    ) -> "ComparisonView":
        """Show a comparison."""
        others = ("jobs", "mlflow_url", "warnings")
        values = {name: getattr(comparison, name) for name in cls.model_fields if name not in others}
        views = [JobSummaryView.of(job, mlflow_public_url) for job in jobs]
        url = comparison_url(mlflow_public_url, comparison)
        return cls(**values, mlflow_url=url, warnings=warnings, jobs=views)


class ComparisonSummaryView(ComparisonFields):
    """Comparison in lists."""

    jobs: dict[JobState, int] = Field(
        examples=[dict.fromkeys(JobState, 0) | {"running": 1, "succeeded": 3}],
        description="number of jobs by state",
    )

    @property
    def is_open(self) -> bool:
        """Whether a job has not ended."""
        return any(count for state, count in self.jobs.items() if not state.is_terminal)

    @classmethod
    def of(
        cls, comparison: Comparison, jobs: Mapping[JobState, int], mlflow_public_url: str
    ) -> "ComparisonSummaryView":
        """Show a comparison."""
        values = {
            name: getattr(comparison, name) for name in cls.model_fields if name not in ("jobs", "mlflow_url")
        }
        counts = {state: jobs.get(state, 0) for state in JobState}
        return cls(**values, mlflow_url=comparison_url(mlflow_public_url, comparison), jobs=counts)


class ComparisonList(BaseModel):
    """Page of comparisons, newest first."""

    comparisons: list[ComparisonSummaryView]
    next_page_token: str | None
