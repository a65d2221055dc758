"""Jobs and their events in the database."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    Column,
    Select,
    String,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.errors import Conflict, NotFound, VersionMismatch
from service.domain.jobs import Event, Job, JobState, JobSummary, Transition
from service.domain.leases import Lease
from service.domain.scheduling import SchedulableJob
from service.store.database import Database, read_page
from service.store.job_inserts import insert_jobs
from service.store.job_rows import (
    CANDIDATE_COLUMNS,
    COLUMNS,
    EVENT_COLUMNS,
    SUMMARY_COLUMNS,
    event_row,
    job_row,
    read_candidate,
    read_event,
    read_job,
    read_progress,
    read_summaries,
)
from service.store.leases import is_held
from service.store.tables import events, job_tags, jobs
from service.store.usage import Period, Totals, Usage, add_usage, read_totals, read_usage
from service.store.webhooks import announce_end
from trainer.jobspec import JobSpec, Progress

UPDATABLE_FIELDS = frozenset({"progress", "mlflow_run_id", "mlflow_experiment_id", "mlflow_closed"})
"""Fields that may change without a transition."""
JOBS_AT_ONCE = 500
ACTIVE = (JobState.SUBMITTED, JobState.RUNNING)
WAITS = (
    jobs.c.state == JobState.QUEUED,
    jobs.c.cancel_requested.is_(False),
    jobs.c.pause_requested.is_(False),
)
"""Conditions of jobs that the scheduler may start."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Filters of a list of jobs; None means all."""

    owner: str | None = None
    state: JobState | None = None
    comparison_id: str | None = None
    norm: str | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Queue:
    """Queue and active jobs, for the scheduler."""

    waiting: dict[str, SchedulableJob]
    """Waiting jobs by job and attempt, such as "id:1"."""
    reasons: dict[str, str]
    """Stored reasons of the waiting jobs that are new to the caller, by job id."""
    active: list[SchedulableJob]


@dataclass(frozen=True)
class JobSnapshot:
    """Snapshot of the changing fields of a job."""

    version: int
    state: JobState
    attempt: int
    progress: Progress | None


class JobStore:
    """Jobs in the database. Updates are guarded by the version of the job.

    A change under a lease has no effect if another replica has taken the lease since.
    """

    def __init__(self, database: Database, max_stored_bytes: int | None = None) -> None:
        """`max_stored_bytes` limits the stored jobs of an owner; None means no limit."""
        self._database, self._max_stored_bytes = database, max_stored_bytes

    async def add(self, job: Job) -> None:
        """Store a new job with its first event.

        Raises NotFound if its source was deleted meanwhile, and QuotaExceeded.
        """
        async with self._database.write() as connection:
            if job.resumed_from is not None:
                # Locked, so that it is not deleted before the new job is there to keep it.
                first = select(jobs.c.id).where(jobs.c.id == job.resumed_from)
                query = first.with_for_update(read=True, key_share=True)
                if (await connection.execute(query)).one_or_none() is None:
                    raise NotFound(f"there is no job {job.resumed_from!r}")
            await insert_jobs(connection, [job], self._max_stored_bytes)

    async def get(self, job_id: str, owner: str | None = None) -> Job:
        """Return a job. Raises NotFound, also if it is not `owner`'s."""
        query = select(*COLUMNS).where(jobs.c.id == job_id)
        found = await self._read(query if owner is None else query.where(jobs.c.owner == owner))
        # Jobs of other owners are not found either, so that ids cannot be probed.
        if not found:
            raise NotFound(f"there is no job {job_id!r}")
        return found[0]

    async def page(
        self, size: int, before: int | None, wanted: Filter = Filter()
    ) -> tuple[list[JobSummary], int | None]:
        """Return a page of jobs, newest first, and the place of the next page."""
        query = select(*SUMMARY_COLUMNS)
        for name in ("owner", "state", "comparison_id", "norm"):
            if (value := getattr(wanted, name)) is not None:
                query = query.where(jobs.c[name] == value)
        place: Column[int] = jobs.c.sequence
        if wanted.tag is not None:
            place = job_tags.c.job_sequence  # whose index has the jobs of a tag in their order
            query = query.join(job_tags, place == jobs.c.sequence).where(job_tags.c.tag == wanted.tag)
        async with self._database.read() as connection:
            rows, more = await read_page(connection, query, place, size, before)
        return await read_summaries(rows), more

    async def list_by_comparison(self, comparison_id: str) -> list[JobSummary]:
        """Return the jobs of a comparison in the order of its matrix."""
        query = (
            select(*SUMMARY_COLUMNS).where(jobs.c.comparison_id == comparison_id).order_by(jobs.c.sequence)
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        return await read_summaries(rows)

    async def specs_of(self, comparison_id: str) -> list[JobSpec]:
        """Return the specs of a comparison's jobs in the order of its matrix."""
        # As text, and read in a thread: all together they may be large.
        query = (
            select(cast(jobs.c.spec, Text))
            .where(jobs.c.comparison_id == comparison_id)
            .order_by(jobs.c.sequence)
        )
        async with self._database.read() as connection:
            found = (await connection.execute(query)).scalars().all()
        return await asyncio.to_thread(lambda: [JobSpec.model_validate_json(text) for text in found])

    async def open_jobs(self, shards: Collection[int]) -> list[Job]:
        """Return the open jobs of these shards, oldest first, except those that only wait."""
        waits = jobs.c.state == JobState.QUEUED
        is_late = and_(jobs.c.queue_until <= datetime.now(UTC), jobs.c.pause_requested.is_(False))
        has_limit = or_(jobs.c.cancel_requested.is_(True), is_late)
        query = select(*COLUMNS).where(
            jobs.c.mlflow_closed.is_(False), jobs.c.shard.in_(shards), or_(~waits, waits & has_limit)
        )
        return await self._read(query.order_by(jobs.c.sequence))

    async def queue(self, known: Mapping[str, SchedulableJob] = MappingProxyType({})) -> Queue:
        """Return the queued and active jobs for the scheduler.

        Jobs in `known`, by job and attempt, are not read again: what the scheduler uses does not change while
        a job waits.
        """
        # Implied by the states, but it is the first column of the index.
        is_open = jobs.c.mlflow_closed.is_(False)
        waits = and_(is_open, *WAITS)
        is_active = and_(is_open, jobs.c.state.in_([state.value for state in ACTIVE]))
        key = jobs.c.id + ":" + cast(jobs.c.attempt, String)
        reasons: dict[str, str] = {}
        async with self._database.read() as connection:
            # As one text: fetching thousands of rows separately would delay requests.
            text = (
                await connection.execute(select(func.aggregate_strings(key, ",")).where(waits))
            ).scalar_one()
            keys = set(text.split(",")) if text else set()
            found = {name: candidate for name, candidate in known.items() if name in keys}
            new = [name.split(":")[0] for name in keys - known.keys()]
            for first in range(0, len(new), JOBS_AT_ONCE):
                query = select(key.label("key"), jobs.c.reason, *CANDIDATE_COLUMNS).where(
                    waits, jobs.c.id.in_(new[first : first + JOBS_AT_ONCE])
                )
                for row in (await connection.execute(query)).all():
                    found[row.key], reasons[row.id] = read_candidate(row), row.reason
            active = (await connection.execute(select(*CANDIDATE_COLUMNS).where(is_active))).all()
        return Queue(found, reasons, [read_candidate(row) for row in active])

    async def first_waiting(
        self, size: int, owner: str | None, starving_since: datetime
    ) -> tuple[list[JobSummary], bool]:
        """Return the first waiting jobs by rank, and whether there are more.

        They are ordered as in `service.domain.scheduling`, but without the shares of owners, which change
        with each admission.
        """
        starves = and_(jobs.c.queued_at <= starving_since, jobs.c.preemptible.is_(False))
        query = select(*SUMMARY_COLUMNS).where(jobs.c.mlflow_closed.is_(False), *WAITS)
        query = query if owner is None else query.where(jobs.c.owner == owner)
        rank = (starves.desc(), case((starves, 0), else_=-jobs.c.priority), jobs.c.queued_at, jobs.c.id)
        async with self._database.read() as connection:
            rows = (await connection.execute(query.order_by(*rank).limit(size + 1))).all()
        return await read_summaries(rows[:size]), len(rows) > size

    async def newest_succeeded(self, size: int, owner: str | None = None) -> list[Job]:
        """Return the newest jobs that have succeeded, of all owners or one."""
        query = select(*COLUMNS).where(jobs.c.state == JobState.SUCCEEDED)
        query = query if owner is None else query.where(jobs.c.owner == owner)
        return await self._read(query.order_by(jobs.c.sequence.desc()).limit(size))

    async def snapshots(self, job_ids: Collection[str]) -> dict[str, JobSnapshot]:
        """Return the snapshots of existing jobs by id."""
        query = select(jobs.c.id, jobs.c.version, jobs.c.state, jobs.c.attempt, jobs.c.progress)
        async with self._database.read() as connection:
            rows = (await connection.execute(query.where(jobs.c.id.in_(job_ids)))).all()
        return {
            row.id: JobSnapshot(row.version, JobState(row.state), row.attempt, read_progress(row.progress))
            for row in rows
        }

    async def totals(self) -> Totals:
        """Return the totals of all jobs."""
        async with self._database.read() as connection:
            return await read_totals(connection, datetime.now(UTC))

    async def usage(self, period: Period) -> dict[str, Usage]:
        """Return the usage of each owner in a period, including deleted jobs."""
        async with self._database.read() as connection:
            return (await read_usage(connection, datetime.now(UTC), period))[0]

    async def events_of(self, job_id: str, after: int = 0) -> list[Event]:
        """Return the events of a job after number `after`, in order."""
        query = select(*EVENT_COLUMNS).where(events.c.job_id == job_id, events.c.sequence > after)
        async with self._database.read() as connection:
            rows = (await connection.execute(query.order_by(events.c.sequence))).all()
        return [read_event(row) for row in rows]

    async def request_cancel(self, job_id: str, actor: str, version: int | None = None) -> Job:
        """Set the cancel flag; idempotent.

        Raises NotFound; Conflict if the job has ended otherwise; VersionMismatch if its version is not
        `version`.
        """
        open_states = [state.value for state in JobState if not state.is_terminal]
        query = (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state.in_(open_states), jobs.c.cancel_requested.is_(False))
            .values(cancel_requested=True, version=jobs.c.version + 1)
        )
        if version is not None:
            query = query.where(jobs.c.version == version)
        async with self._database.write() as connection:
            # Only the request that sets the flag writes an event.
            if (await connection.execute(query)).rowcount:
                job = read_job((await connection.execute(select(*COLUMNS).where(jobs.c.id == job_id))).one())
                request = replace(job, reason="cancellation requested")
                await connection.execute(
                    insert(events).values(**event_row(request, datetime.now(UTC), actor))
                )
                return job
        job = await self.get(job_id)
        if version is not None and job.version != version:
            raise VersionMismatch(f"job {job_id} has changed since: it is {job.state.value}, {job.reason}")
        if job.state.is_terminal and job.state != JobState.CANCELLED:
            raise Conflict(
                f"job {job_id} has already {job.state.value}; only jobs that have not ended can be cancelled"
            )
        return job

    async def request_pause(self, job_id: str, actor: str, version: int | None = None) -> Job:
        """Set the pause flag; idempotent.

        Raises NotFound; Conflict if the job has ended or is being cancelled; VersionMismatch.
        """

        def pause(job: Job, now: datetime) -> Job:
            if job.state.is_terminal or job.cancel_requested:
                raise Conflict(f"job {job_id} {_has_ended(job)}; it can no longer be paused")
            return job if job.pause_requested else job.pause(now, actor)

        return await self._request(job_id, pause, "pause requested", actor, version)

    async def request_unpause(self, job_id: str, actor: str) -> Job:
        """Clear the pause flag. Raises NotFound; Conflict if it is not set."""

        def unpause(job: Job, now: datetime) -> Job:
            if not job.pause_requested:
                raise Conflict(f"job {job_id} is {job.state.value}; it is not paused")
            return job.unpause(now, actor)

        return await self._request(job_id, unpause, "resumption requested", actor)

    async def preempt(self, job_id: str, by: str, actor: str, lease: Lease) -> None:
        """Ask an active job to give its resources to another one, unless it stops anyway."""

        def preempt(job: Job, now: datetime) -> Job:
            may_run = job.state in ACTIVE and not job.cancel_requested and job.stop_requested_at is None
            return job.preempt(by, now) if may_run else job

        await self._request(job_id, preempt, f"preemption by {by} requested", actor, lease=lease)

    async def _request(
        self,
        job_id: str,
        change: Callable[[Job, datetime], Job],
        event: str,
        actor: str,
        version: int | None = None,
        lease: Lease | None = None,
    ) -> Job:
        """Store a change of a job's flags with its event; no event if nothing changes."""
        now = datetime.now(UTC)
        async with self._database.write() as connection:
            query = select(*COLUMNS).where(jobs.c.id == job_id).with_for_update()
            if (row := (await connection.execute(query)).one_or_none()) is None:
                raise NotFound(f"there is no job {job_id!r}")
            job = read_job(row)
            if version is not None and job.version != version:
                raise VersionMismatch(
                    f"job {job_id} has changed since: it is {job.state.value}, {job.reason}"
                )
            after = change(job, now)
            if after is job or not await self._store(connection, job, after, lease):
                return job
            request = replace(after, reason=event)
            await connection.execute(insert(events).values(**event_row(request, now, actor)))
        return after

    async def advance(self, job: Job, step: Transition, actor: str, lease: Lease | None = None) -> Job | None:
        """Apply a transition with its event.

        None, without an effect, if the job has changed.
        """
        now = datetime.now(UTC)
        after = job.apply(step, now)
        async with self._database.write() as connection:
            if not await self._store(connection, job, after, lease):
                return None
            await connection.execute(insert(events).values(**event_row(after, now, actor)))
            # In the same transaction, so that a crash cannot lose the message.
            if after.state.is_terminal:
                await announce_end(connection, after, now)
            if after.state == JobState.QUEUED or after.state.is_terminal:
                await add_usage(connection, job.owner, job.started_at or now, now, job.max_resources)
        return after

    async def update_fields(self, job: Job, lease: Lease | None = None, **changes: Any) -> Job | None:
        """Update fields of a job without a transition; None if the job has changed."""
        assert changes.keys() <= UPDATABLE_FIELDS, changes
        after = replace(job, **changes, version=job.version + 1)
        async with self._database.write() as connection:
            return after if await self._store(connection, job, after, lease) else None

    async def set_queue_reasons(self, reasons: dict[str, str], lease: Lease) -> None:
        """Store why jobs wait.

        No decision depends on the text, so the version does not change.
        """
        query = update(jobs).where(jobs.c.id == bindparam("job"), *WAITS, is_held(lease))
        rows = [{"job": job_id, "words": reason} for job_id, reason in reasons.items()]
        for first in range(0, len(rows), JOBS_AT_ONCE):  # others write in between
            async with self._database.write() as connection:
                await connection.execute(
                    query.values(reason=bindparam("words")), rows[first : first + JOBS_AT_ONCE]
                )

    async def _store(self, connection: AsyncConnection, before: Job, after: Job, lease: Lease | None) -> bool:
        query = update(jobs).where(jobs.c.id == before.id, jobs.c.version == before.version)
        query = query.values(**job_row(after))
        result = await connection.execute(query if lease is None else query.where(is_held(lease)))
        return result.rowcount == 1

    async def _read(self, query: Select[Any]) -> list[Job]:
        async with self._database.read() as connection:
            return [read_job(row) for row in (await connection.execute(query)).all()]


def _has_ended(job: Job) -> str:
    return f"has already {job.state.value}" if job.state.is_terminal else "is being cancelled"
