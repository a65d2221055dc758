"""Sums over all jobs, for metrics."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.jobs import JobState
from service.store.tables import jobs
from service.store.usage import Usage, read_usage


@dataclass(frozen=True)
class Totals:
    """Totals of all jobs, and their usage."""

    jobs: dict[JobState, int]
    queued: dict[str, int]
    """By owner."""
    oldest_queued_at: datetime | None
    usage: dict[str, Usage]
    """By owner; of jobs that were deleted too."""


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
