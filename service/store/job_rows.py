"""Conversion of jobs and their events to rows of the database, and back."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from service.domain.jobs import Event, Job, JobRecord, JobState, JobSummary, submission_id
from service.domain.leases import shard_of
from service.domain.resources import Resources
from service.domain.retries import Failures, Retries, RetryGroup
from service.domain.scheduling import SchedulableJob
from service.store.tables import events, jobs
from trainer.jobspec import JobSpec, Progress

COLUMNS = [jobs.c[field.name] for field in fields(Job)]
SUMMARY_COLUMNS = [
    *[jobs.c[field.name] for field in fields(JobRecord)],
    jobs.c.norm,
    jobs.c.spec["seed"].as_integer().label("seed"),
    jobs.c.spec["steps"].as_integer().label("steps"),
    jobs.c.max_cpus,
    jobs.c.max_gpus,
]
"""Columns of lists, which do not read specs, as a page has up to 200 jobs."""
CANDIDATE_COLUMNS = [
    jobs.c[name]
    for name in (
        "id", "owner", "priority", "preemptible", "preempted_by", "queued_at", "not_before", "attempt",
        "cancel_requested", "stop_requested_at",
        "min_cpus", "min_gpus", "max_cpus", "max_gpus", "accelerator_type",
    )
]  # fmt: skip
EVENT_COLUMNS = [events.c[field.name] for field in fields(Event)]
MADE_AT_ONCE = 50


def job_row(job: Job) -> dict[str, Any]:
    """Convert a job to the values of its row."""
    row = {field.name: getattr(job, field.name) for field in fields(Job)}
    row["spec"] = job.spec.model_dump(mode="json")
    row["tags"] = list(job.tags)
    row["retries"] = job.retries.model_dump()
    row["failures"] = {group.value: count for group, count in job.failures.counts.items()}
    row["state"] = job.state.value
    row["progress"] = job.progress.model_dump() if job.progress else None
    # Stored with the job, so that the scheduler does not parse specs.
    candidate = job.schedulable()
    return row | {
        "norm": job.spec.norm,
        "queue_until": job.queue_until,
        "shard": shard_of(job.id),
        "min_cpus": candidate.min_resources.cpus,
        "min_gpus": candidate.min_resources.gpus,
        "max_cpus": candidate.max_resources.cpus,
        "max_gpus": candidate.max_resources.gpus,
        "accelerator_type": candidate.accelerator_type,
    }


def read_job(row: Any) -> Job:
    """Convert a row of COLUMNS to a job."""
    # From JSON: strict validation of Python values would reject lists for tuples and text for enumerations.
    return Job(**_record(row), spec=JobSpec.model_validate_json(json.dumps(row.spec)))


async def read_summaries(rows: Sequence[Any]) -> list[JobSummary]:
    """Convert rows of SUMMARY_COLUMNS to summaries, in a thread if there are many."""
    if len(rows) <= MADE_AT_ONCE:
        return [_summary(row) for row in rows]
    return await asyncio.to_thread(lambda: [_summary(row) for row in rows])


def _summary(row: Any) -> JobSummary:
    held = Resources(row.max_cpus, row.max_gpus)
    return JobSummary(**_record(row), norm=row.norm, seed=row.seed, steps=row.steps, max_resources=held)


def _record(row: Any) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in fields(JobRecord)}
    return values | {
        "tags": tuple(row.tags),
        "retries": Retries(**row.retries),
        "failures": Failures({RetryGroup(group): count for group, count in row.failures.items()}),
        "state": JobState(row.state),
        "progress": read_progress(row.progress),
    }


def read_progress(content: Any) -> Progress | None:
    """Convert a job's progress; None if there is none yet."""
    return Progress.model_validate(content) if content else None


def read_candidate(row: Any) -> SchedulableJob:
    """Convert a row of CANDIDATE_COLUMNS to a schedulable job."""
    return SchedulableJob(
        id=row.id,
        owner=row.owner,
        priority=row.priority,
        accelerator_type=row.accelerator_type,
        preemptible=row.preemptible,
        preempted_by=row.preempted_by,
        is_stopping=row.cancel_requested or row.stop_requested_at is not None,
        queued_at=row.queued_at,
        not_before=row.not_before,
        min_resources=Resources(row.min_cpus, row.min_gpus),
        max_resources=Resources(row.max_cpus, row.max_gpus),
        submission_id=submission_id(row.id, row.attempt),
    )


def event_row(job: Job, at: datetime, actor: str) -> dict[str, Any]:
    """Return the row of the event of a job's last transition."""
    return {
        "job_id": job.id,
        "at": at,
        "state": job.state.value,
        "reason": job.reason,
        "actor": actor,
        "attempt": job.attempt,
    }


def read_event(row: Any) -> Event:
    """Convert a row of EVENT_COLUMNS to an event."""
    return Event(**(row._asdict() | {"state": JobState(row.state)}))
