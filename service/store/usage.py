"""Usage of owners, which outlives their jobs, and sums over all jobs."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.jobs import JobState
from service.domain.scheduling import Resources
from service.store.database import upsert
from service.store.tables import jobs, usage


@dataclass(frozen=True)
class Usage:
    """Seconds of ended attempts times their maximum resources."""

    gpu_seconds: float
    cpu_seconds: float


async def add_usage(connection: AsyncConnection, owner: str, seconds: float, held: Resources) -> None:
    """Add the usage of an ended attempt in the caller's transaction.

    It must be the last statement.
    """
    values = {"owner": owner, "gpu_seconds": seconds * held.gpus, "cpu_seconds": seconds * held.cpus}
    query = upsert(connection, usage).values(**values)
    sums = {name: usage.c[name] + query.excluded[name] for name in ("gpu_seconds", "cpu_seconds")}
    await connection.execute(query.on_conflict_do_update(index_elements=[usage.c.owner], set_=sums))


async def add_stored_bytes(connection: AsyncConnection, owner: str, count: int) -> int:
    """Add to the stored bytes of an owner in the caller's transaction; return the sum."""
    query = upsert(connection, usage).values(
        owner=owner, gpu_seconds=0.0, cpu_seconds=0.0, stored_bytes=count
    )
    sums = {"stored_bytes": usage.c.stored_bytes + query.excluded.stored_bytes}
    query = query.on_conflict_do_update(index_elements=[usage.c.owner], set_=sums)
    return int((await connection.execute(query.returning(usage.c.stored_bytes))).scalar_one())


async def read_usage(connection: AsyncConnection) -> dict[str, Usage]:
    """Return the usage of each owner."""
    rows = (await connection.execute(select(usage))).all()
    return {row.owner: Usage(row.gpu_seconds, row.cpu_seconds) for row in rows}


@dataclass(frozen=True)
class Totals:
    """Totals of all jobs, and their usage."""

    jobs: dict[JobState, int]
    queued: dict[str, int]
    """Number of queued jobs by owner."""
    oldest_queued_at: datetime | None
    usage: dict[str, Usage]
    """Usage by owner, including deleted jobs."""


async def read_totals(connection: AsyncConnection) -> Totals:
    """Return the totals of all jobs."""
    states = select(jobs.c.state, func.count()).group_by(jobs.c.state)
    queued = (
        select(jobs.c.owner, func.count(), func.min(jobs.c.queued_at))
        .where(jobs.c.state == JobState.QUEUED)
        .group_by(jobs.c.owner)
    )
    by_state, by_owner = [(await connection.execute(query)).all() for query in (states, queued)]
    return Totals(
        {JobState(state): count for state, count in by_state},
        {owner: count for owner, count, _ in by_owner},
        min((oldest for _, _, oldest in by_owner), default=None),
        await read_usage(connection),
    )
