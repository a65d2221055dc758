"""Jobs and comparisons for tests."""

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from service.domain.comparisons import Comparison
from service.domain.jobs import Job, JobRecord, JobSummary, new_id
from trainer.jobspec import JobSpec


def make_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "id": new_id("job"),
        "name": "example",
        "spec": JobSpec(steps=10, num_workers=1),
        "owner": "admin",
        "reason": "submitted by the user",
        "created_at": datetime.now(UTC),
        "queued_at": datetime.now(UTC),
    }
    return Job(**(values | changes))


def summary_of(job: Job) -> JobSummary:
    """Return a job as in lists."""
    record = {field.name: getattr(job, field.name) for field in fields(JobRecord)}
    return JobSummary(
        **record, norm=job.norm, seed=job.seed, steps=job.steps, max_resources=job.max_resources
    )


def make_comparison(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "id": new_id("comparison"),
        "name": "example",
        "owner": "admin",
        "matrix": {"norm": ["none", "sync"], "seed": [0, 1]},
        "baseline": {"norm": "none"},
        "metric": "accuracy",
        "target": 0.8,
        "created_at": datetime.now(UTC),
    }
    return Comparison(**(values | changes))
