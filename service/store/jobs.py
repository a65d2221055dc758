"""Jobs and their events in the database."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.errors import Conflict, NotFound
from service.domain.jobs import Event, Job, JobState, Transition, is_legal
from service.store.database import Database
from service.store.tables import events, jobs
from trainer.spec import JobSpec, Progress

COLUMNS = [jobs.c[field.name] for field in fields(Job)]
NOTED = frozenset({"progress", "mlflow_run_id", "mlflow_experiment_id", "mlflow_closed", "reason"})
"""What may change without a transition."""


class JobStore:
    """Queries about jobs. A stored change either happens whole or, if the job has changed since it was read, not at all."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, job: Job) -> None:
        """Store a new job with its first event."""
        async with self._database.write() as connection:
            await insert_jobs(connection, [job])

    async def get(self, job_id: str) -> Job:
        """Read one job. Raises NotFound."""
        found = await self._read(select(*COLUMNS).where(jobs.c.id == job_id))
        if not found:
            raise NotFound(f"there is no job {job_id!r}")
        return found[0]

    async def page(self, size: int, before: int | None) -> tuple[list[Job], int | None]:
        """Read up to `size` jobs, newest first, older than place `before`; also the place to go on from, if there is more."""
        query = select(*COLUMNS, jobs.c.sequence).order_by(jobs.c.sequence.desc()).limit(size + 1)
        if before is not None:
            query = query.where(jobs.c.sequence < before)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        more = rows[size - 1].sequence if len(rows) > size else None
        return [_job(row) for row in rows[:size]], more

    async def of_comparison(self, comparison_id: str) -> list[Job]:
        """Read a comparison's jobs in the order of its matrix."""
        return await self._read(select(*COLUMNS).where(jobs.c.comparison_id == comparison_id).order_by(jobs.c.sequence))

    async def unsettled(self) -> list[Job]:
        """Read the jobs that the dispatcher still has to do something for, oldest first."""
        return await self._read(select(*COLUMNS).where(jobs.c.mlflow_closed.is_(False)).order_by(jobs.c.sequence))

    async def events_of(self, job_id: str) -> list[Event]:
        """Read a job's transitions in order."""
        query = select(*[events.c[field.name] for field in fields(Event)]).where(events.c.job_id == job_id)
        async with self._database.read() as connection:
            rows = (await connection.execute(query.order_by(events.c.sequence))).all()
        return [Event(**(row._asdict() | {"state": JobState(row.state)})) for row in rows]

    async def request_cancel(self, job_id: str) -> Job:
        """Set the wish to cancel; asking twice changes nothing. Raises NotFound, and Conflict if the job has ended otherwise."""
        open_states = [state.value for state in JobState if not state.is_terminal]
        query = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state.in_(open_states), jobs.c.cancel_requested.is_(False))
            .values(cancel_requested=True, version=jobs.c.version + 1)
        )
        async with self._database.write() as connection:
            await connection.execute(query)
        job = await self.get(job_id)
        if job.state.is_terminal and job.state != JobState.CANCELLED:
            raise Conflict(
                f"job {job_id} has already {job.state.value}; only jobs that have not ended can be cancelled"
            )
        return job

    async def advance(self, job: Job, step: Transition, actor: str) -> Job | None:
        """Take `job` a step further, with its event; None if it has changed since it was read, and then nothing is stored."""
        if not is_legal(job.state, step.state):
            raise AssertionError(f"{job.id}: {job.state} -> {step.state} is no transition")
        now = datetime.now(UTC)
        started = {JobState.RUNNING: job.started_at or now, JobState.QUEUED: None}.get(step.state, job.started_at)
        after = replace(
            job,
            state=step.state,
            reason=step.reason,
            attempt=step.attempt or job.attempt,
            progress=None if step.attempt else job.progress,
            started_at=started,
            ended_at=now if step.state.is_terminal else None,
        )
        async with self._database.write() as connection:
            if not await self._store(connection, job, after):
                return None
            await connection.execute(insert(events).values(**_event(after, now, actor)))
        return replace(after, version=job.version + 1)

    async def note(self, job: Job, **changes: Any) -> Job | None:
        """Store facts about `job` that are no transition; None if it has changed since it was read."""
        assert changes.keys() <= NOTED, changes
        after = replace(job, **changes)
        async with self._database.write() as connection:
            return replace(after, version=job.version + 1) if await self._store(connection, job, after) else None

    async def _store(self, connection: AsyncConnection, before: Job, after: Job) -> bool:
        values = _row(replace(after, version=before.version + 1))
        result = await connection.execute(
            update(jobs).where(jobs.c.id == before.id, jobs.c.version == before.version).values(**values)
        )
        return result.rowcount == 1

    async def _read(self, query: Select[Any]) -> list[Job]:
        async with self._database.read() as connection:
            return [_job(row) for row in (await connection.execute(query)).all()]


async def insert_jobs(connection: AsyncConnection, new: Sequence[Job]) -> None:
    """Store new jobs with their first events, inside the caller's transaction."""
    await connection.execute(insert(jobs), [_row(job) for job in new])
    await connection.execute(insert(events), [_event(job, job.created_at, "user") for job in new])


def _row(job: Job) -> dict[str, Any]:
    row = {field.name: getattr(job, field.name) for field in fields(Job)}
    row["spec"] = job.spec.model_dump(mode="json")
    row["state"] = job.state.value
    row["progress"] = job.progress.model_dump() if job.progress else None
    return row


def _job(row: Any) -> Job:
    values = {field.name: getattr(row, field.name) for field in fields(Job)}
    values["spec"] = JobSpec.model_validate_json(json.dumps(row.spec))
    values["state"] = JobState(row.state)
    values["progress"] = Progress.model_validate(row.progress) if row.progress else None
    return Job(**values)


def _event(job: Job, at: datetime, actor: str) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "at": at,
        "state": job.state.value,
        "reason": job.reason,
        "actor": actor,
        "attempt": job.attempt,
    }
