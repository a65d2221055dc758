"""Jobs and their events in the database."""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Select,
    String,
    Text,
    and_,
    bindparam,
    cast,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.comparisons import size_of
from service.domain.errors import Changed, Conflict, NotFound, QuotaExceeded
from service.domain.jobs import Event, Job, JobRecord, JobState, JobSummary, Transition, is_legal, submission_id
from service.domain.leases import Lease, shard_of
from service.domain.retries import Blame, Failures, Retries
from service.domain.scheduling import Candidate, Capacity
from service.store.database import Database
from service.store.leases import is_held
from service.store.pages import read_page
from service.store.tables import events, job_tags, jobs
from service.store.usage import Usage, add_stored_bytes, add_usage, read_usage
from service.store.webhooks import announce_end
from trainer.spec import JobSpec, Progress

COLUMNS = [jobs.c[field.name] for field in fields(Job)]
SUMMARY_COLUMNS = [
    *[jobs.c[field.name] for field in fields(JobRecord)],
    jobs.c.norm,
    jobs.c.spec["seed"].as_integer().label("seed"),
    jobs.c.spec["steps"].as_integer().label("steps"),
]
"""Of lists, which do not read specs: a page has up to 200 jobs."""
CANDIDATE_COLUMNS = [
    jobs.c[name]
    for name in (
        "id", "owner", "priority", "queued_at", "not_before", "attempt",
        "least_cpus", "least_gpus", "most_cpus", "most_gpus",
    )
]  # fmt: skip
INSERT_JOBS, INSERT_EVENTS, INSERT_TAGS = (
    insert(jobs).returning(jobs.c.id, jobs.c.sequence),
    insert(events),
    insert(job_tags),
)
"""Made once, as each submission needs them: making a statement takes about as long as running it."""
NOTED = frozenset({"progress", "mlflow_run_id", "mlflow_experiment_id", "mlflow_closed"})
"""What may change without a transition."""
JOBS_AT_ONCE = 500
INSERTED_AT_ONCE, MADE_AT_ONCE = 32, 50
BYTES_BESIDE_SPEC = 1_000
"""What a job takes in the database besides its spec and variant, about."""
ACTIVE = (JobState.SUBMITTED, JobState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which jobs to list; None is all."""

    owner: str | None = None
    state: JobState | None = None
    comparison_id: str | None = None
    norm: str | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Queue:
    """What the scheduler decides on."""

    waiting: dict[str, Candidate]
    """By job and attempt, as "id:1"."""
    reasons: dict[str, str]
    """Why those of them wait that were not known, as it is told now; by the job's id."""
    active: list[Candidate]


@dataclass(frozen=True)
class Pulse:
    """What changes of a job while it goes on."""

    version: int
    state: JobState
    attempt: int
    progress: Progress | None


@dataclass(frozen=True)
class Totals:
    """All jobs, summed up, and what they used."""

    jobs: dict[JobState, int]
    queued: dict[str, int]
    """By owner."""
    oldest_queued_at: datetime | None
    usage: dict[str, Usage]
    """By owner; of jobs that were deleted too."""


class JobStore:
    """Queries about jobs. A stored change either happens whole or, if the job has changed since it was read, not at all.

    A change that is made under a lease does not happen either if another replica has taken the lease since.
    """

    def __init__(self, database: Database, max_stored_bytes: int | None = None) -> None:
        """Refuse jobs by which those of their owner would take more than `max_stored_bytes`; None: no limit."""
        self._database, self._max_stored_bytes = database, max_stored_bytes

    async def add(self, job: Job) -> None:
        """Store a new job with its first event.

        Raises NotFound if the one it is resumed from has been deleted meanwhile, and QuotaExceeded.
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
        """Read one job. Raises NotFound, also if it is not `owner`'s."""
        query = select(*COLUMNS).where(jobs.c.id == job_id)
        found = await self._read(query if owner is None else query.where(jobs.c.owner == owner))
        if not found:
            raise NotFound(f"there is no job {job_id!r}")
        return found[0]

    async def page(
        self, size: int, before: int | None, wanted: Filter = Filter()
    ) -> tuple[list[JobSummary], int | None]:
        """Read up to `size` jobs, newest first, older than place `before`; also the place to go on from, if there is more."""
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
        return await _summaries(rows), more

    async def of_comparison(self, comparison_id: str) -> list[JobSummary]:
        """Read a comparison's jobs in the order of its matrix."""
        query = select(*SUMMARY_COLUMNS).where(jobs.c.comparison_id == comparison_id).order_by(jobs.c.sequence)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        return await _summaries(rows)

    async def specs_of(self, comparison_id: str) -> list[JobSpec]:
        """Read the specs of a comparison's jobs, in the order of its matrix."""
        # As text, and read in a thread: all together they may be large.
        query = select(cast(jobs.c.spec, Text)).where(jobs.c.comparison_id == comparison_id).order_by(jobs.c.sequence)
        async with self._database.read() as connection:
            found = (await connection.execute(query)).scalars().all()
        return await asyncio.to_thread(lambda: [JobSpec.model_validate_json(text) for text in found])

    async def unsettled(self, shards: Collection[int]) -> list[Job]:
        """Read the jobs of these shards that there is something to do for, oldest first; not those that only wait in the queue."""
        waits = jobs.c.state == JobState.QUEUED
        has_limit = or_(jobs.c.cancel_requested.is_(True), jobs.c.queue_until <= datetime.now(UTC))
        query = select(*COLUMNS).where(
            jobs.c.mlflow_closed.is_(False), jobs.c.shard.in_(shards), or_(~waits, waits & has_limit)
        )
        return await self._read(query.order_by(jobs.c.sequence))

    async def queue(self, known: Mapping[str, Candidate] = MappingProxyType({})) -> Queue:
        """Read what the scheduler has to know of all jobs that wait, and of those that are with Ray.

        What is known already, by job and attempt, is not read again: while a job waits, nothing that counts changes.
        """
        is_open = jobs.c.mlflow_closed.is_(False)
        waits = and_(is_open, jobs.c.state == JobState.QUEUED, jobs.c.cancel_requested.is_(False))
        is_active = and_(is_open, jobs.c.state.in_([state.value for state in ACTIVE]))
        key = jobs.c.id + ":" + cast(jobs.c.attempt, String)
        reasons: dict[str, str] = {}
        async with self._database.read() as connection:
            # As one text: of thousands of rows each would take its turn with the requests that are being answered.
            text = (await connection.execute(select(func.aggregate_strings(key, ",")).where(waits))).scalar_one()
            keys = set(text.split(",")) if text else set()
            found = {name: candidate for name, candidate in known.items() if name in keys}
            new = [name.split(":")[0] for name in keys - known.keys()]
            for first in range(0, len(new), JOBS_AT_ONCE):
                query = select(key.label("key"), jobs.c.reason, *CANDIDATE_COLUMNS).where(
                    waits, jobs.c.id.in_(new[first : first + JOBS_AT_ONCE])
                )
                for row in (await connection.execute(query)).all():
                    found[row.key], reasons[row.id] = _candidate(row), row.reason
            active = (await connection.execute(select(*CANDIDATE_COLUMNS).where(is_active))).all()
        return Queue(found, reasons, [_candidate(row) for row in active])

    async def pulses(self, job_ids: Collection[str]) -> dict[str, Pulse]:
        """Read the pulses of these jobs, by id; of those there are."""
        query = select(jobs.c.id, jobs.c.version, jobs.c.state, jobs.c.attempt, jobs.c.progress)
        async with self._database.read() as connection:
            rows = (await connection.execute(query.where(jobs.c.id.in_(job_ids)))).all()
        return {row.id: Pulse(row.version, JobState(row.state), row.attempt, _progress(row.progress)) for row in rows}

    async def totals(self) -> Totals:
        """Sum up all jobs."""
        states = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        queued = (
            select(jobs.c.owner, func.count(), func.min(jobs.c.queued_at))
            .where(jobs.c.state == JobState.QUEUED)
            .group_by(jobs.c.owner)
        )
        async with self._database.read() as connection:
            by_state, by_owner = [(await connection.execute(query)).all() for query in (states, queued)]
            used = await read_usage(connection)
        return Totals(
            {JobState(state): count for state, count in by_state},
            {owner: count for owner, count, _ in by_owner},
            min((oldest for _, _, oldest in by_owner), default=None),
            used,
        )

    async def events_of(self, job_id: str, after: int = 0) -> list[Event]:
        """Read a job's events in order, those after number `after`."""
        query = select(*[events.c[field.name] for field in fields(Event)]).where(
            events.c.job_id == job_id, events.c.sequence > after
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(query.order_by(events.c.sequence))).all()
        return [Event(**(row._asdict() | {"state": JobState(row.state)})) for row in rows]

    async def request_cancel(self, job_id: str, actor: str, version: int | None = None) -> Job:
        """Set the wish to cancel; asking twice changes nothing.

        Raises NotFound; Conflict if the job has ended otherwise; Changed if it has another `version` than the given one.
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
            if (await connection.execute(query)).rowcount:
                job = _job((await connection.execute(select(*COLUMNS).where(jobs.c.id == job_id))).one())
                wish = replace(job, reason="asked to cancel")
                await connection.execute(insert(events).values(**_event(wish, datetime.now(UTC), actor)))
                return job
        job = await self.get(job_id)
        if version is not None and job.version != version:
            raise Changed(f"job {job_id} has changed since: it is {job.state.value}, {job.reason}")
        if job.state.is_terminal and job.state != JobState.CANCELLED:
            raise Conflict(
                f"job {job_id} has already {job.state.value}; only jobs that have not ended can be cancelled"
            )
        return job

    async def advance(self, job: Job, step: Transition, actor: str, lease: Lease | None = None) -> Job | None:
        """Take `job` a step further, with its event; None if it has changed since it was read, and then nothing is stored."""
        if not is_legal(job.state, step.state):
            raise AssertionError(f"{job.id}: {job.state} -> {step.state} is no transition")
        now = datetime.now(UTC)
        after = replace(job, state=step.state, reason=step.reason)
        if step.state == JobState.RUNNING:
            after = replace(after, started_at=now)
        elif step.state == JobState.QUEUED:
            after = replace(
                after,
                attempt=job.attempt + 1,
                failures=step.failures or job.failures,
                ran_seconds=job.seconds_run(now),
                progress=None,
                started_at=None,
                queued_at=now,
                not_before=step.not_before,
            )
        elif step.state.is_terminal:
            after = replace(after, ran_seconds=job.seconds_run(now), ended_at=now)
        async with self._database.write() as connection:
            if not await self._store(connection, job, after, lease):
                return None
            await connection.execute(insert(events).values(**_event(after, now, actor)))
            if after.state.is_terminal:
                await announce_end(connection, after, now)
            if after.state == JobState.QUEUED or after.state.is_terminal:
                ran_seconds = after.ran_seconds - job.ran_seconds
                await add_usage(connection, job.owner, ran_seconds, job.candidate().most)
        return replace(after, version=job.version + 1)

    async def note(self, job: Job, lease: Lease | None = None, **changes: Any) -> Job | None:
        """Store facts about `job` that are no transition; None if it has changed since it was read."""
        assert changes.keys() <= NOTED, changes
        after = replace(job, **changes)
        async with self._database.write() as connection:
            return replace(after, version=job.version + 1) if await self._store(connection, job, after, lease) else None

    async def explain(self, reasons: dict[str, str], lease: Lease) -> None:
        """Tell why jobs wait. The words are no fact that anything is decided on, so the version stays."""
        query = update(jobs).where(jobs.c.id == bindparam("job"), jobs.c.state == JobState.QUEUED, is_held(lease))
        told = [{"job": job_id, "words": reason} for job_id, reason in reasons.items()]
        for first in range(0, len(told), JOBS_AT_ONCE):  # others write in between
            async with self._database.write() as connection:
                await connection.execute(query.values(reason=bindparam("words")), told[first : first + JOBS_AT_ONCE])

    async def _store(self, connection: AsyncConnection, before: Job, after: Job, lease: Lease | None) -> bool:
        values = _row(replace(after, version=before.version + 1))
        query = update(jobs).where(jobs.c.id == before.id, jobs.c.version == before.version).values(**values)
        result = await connection.execute(query if lease is None else query.where(is_held(lease)))
        return result.rowcount == 1

    async def _read(self, query: Select[Any]) -> list[Job]:
        async with self._database.read() as connection:
            return [_job(row) for row in (await connection.execute(query)).all()]


async def insert_jobs(connection: AsyncConnection, new: Sequence[Job], max_stored_bytes: int | None = None) -> None:
    """Store new jobs of one owner with their first events, inside the caller's transaction. Raises QuotaExceeded."""

    def insert_some(connection: Connection, some: Sequence[Job]) -> int:
        tags_of = {job.id: job.tags for job in some}
        contents = [_row(job) | {"stored_bytes": _stored_bytes(job)} for job in some]
        rows = connection.execute(INSERT_JOBS, contents).all()
        connection.execute(INSERT_EVENTS, [_event(job, job.created_at, job.owner) for job in some])
        tags = [{"tag": tag, "job_sequence": row.sequence, "job_id": row.id} for row in rows for tag in tags_of[row.id]]
        if tags:
            connection.execute(INSERT_TAGS, tags)
        return sum(int(content["stored_bytes"]) for content in contents)

    size = 0
    for first in range(0, len(new), INSERTED_AT_ONCE):  # other requests are answered in between
        size += await connection.run_sync(insert_some, new[first : first + INSERTED_AT_ONCE])
    stored = await add_stored_bytes(connection, new[0].owner, size)
    if max_stored_bytes is not None and stored > max_stored_bytes:
        raise QuotaExceeded(
            f"the jobs of {new[0].owner} would take {stored:,} bytes in the database; at most {max_stored_bytes:,} are allowed. "
            "Retention deletes ended jobs, and the operator sets SYNCBN_QUOTA_STORED_BYTES"
        )


def _stored_bytes(job: Job) -> int:
    """Bytes that a job takes in the database, with its events, about."""
    return len(job.spec.model_dump_json()) + size_of(job.variant) + BYTES_BESIDE_SPEC


def _row(job: Job) -> dict[str, Any]:
    row = {field.name: getattr(job, field.name) for field in fields(Job)}
    row["spec"] = job.spec.model_dump(mode="json")
    row["tags"] = list(job.tags)
    row["retries"] = job.retries.model_dump()
    row["failures"] = {blame.value: count for blame, count in job.failures.counts.items()}
    row["state"] = job.state.value
    row["progress"] = job.progress.model_dump() if job.progress else None
    candidate = job.candidate()
    return row | {
        "norm": job.spec.norm,
        "queue_until": job.queue_until,
        "shard": shard_of(job.id),
        "least_cpus": candidate.least.cpus,
        "least_gpus": candidate.least.gpus,
        "most_cpus": candidate.most.cpus,
        "most_gpus": candidate.most.gpus,
    }


def _job(row: Any) -> Job:
    return Job(**_record(row), spec=JobSpec.model_validate_json(json.dumps(row.spec)))


async def _summaries(rows: Sequence[Any]) -> list[JobSummary]:
    """Make summaries of rows: in a thread if there are many, so that other requests are answered meanwhile."""
    if len(rows) <= MADE_AT_ONCE:
        return [_summary(row) for row in rows]
    return await asyncio.to_thread(lambda: [_summary(row) for row in rows])


def _summary(row: Any) -> JobSummary:
    return JobSummary(**_record(row), norm=row.norm, seed=row.seed, steps=row.steps)


def _record(row: Any) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in fields(JobRecord)}
    return values | {
        "tags": tuple(row.tags),
        "retries": Retries(**row.retries),
        "failures": Failures({Blame(blame): count for blame, count in row.failures.items()}),
        "state": JobState(row.state),
        "progress": _progress(row.progress),
    }


def _progress(content: Any) -> Progress | None:
    return Progress.model_validate(content) if content else None


def _candidate(row: Any) -> Candidate:
    return Candidate(
        id=row.id,
        owner=row.owner,
        priority=row.priority,
        queued_at=row.queued_at,
        not_before=row.not_before,
        least=Capacity(row.least_cpus, row.least_gpus),
        most=Capacity(row.most_cpus, row.most_gpus),
        submission_id=submission_id(row.id, row.attempt),
    )


def _event(job: Job, at: datetime, actor: str) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "at": at,
        "state": job.state.value,
        "reason": job.reason,
        "actor": actor,
        "attempt": job.attempt,
    }
