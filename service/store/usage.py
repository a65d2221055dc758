"""Usage of owners, which outlives their jobs, and sums over all jobs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import Select, Table, cast, func, null, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.jobs import JobState
from service.domain.resources import Resources
from service.store.database import upsert
from service.store.tables import UtcDateTime, jobs, usage, usage_days


@dataclass(frozen=True)
class Usage:
    """Seconds of attempts times their maximum resources."""

    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, seconds: float, held: Resources) -> "Usage":
        """Return the usage with that of another attempt."""
        return Usage(self.gpu_seconds + seconds * held.gpus, self.cpu_seconds + seconds * held.cpus)


@dataclass(frozen=True)
class Period:
    """Days of UTC; None means no limit."""

    since: date | None = None
    until: date | None = None
    """The first day after the period."""

    @property
    def is_unlimited(self) -> bool:
        """Return whether it includes all days."""
        return self.since is None and self.until is None

    def includes(self, day: date) -> bool:
        """Return whether a day is in the period."""
        return (self.since is None or self.since <= day) and (self.until is None or day < self.until)


def seconds_by_day(start: datetime, end: datetime) -> dict[date, float]:
    """Divide the time between two moments by the days of UTC."""
    found: dict[date, float] = {}
    start = start.astimezone(UTC)
    while start < end:
        midnight = datetime.combine(start.date() + timedelta(days=1), time(), UTC)
        found[start.date()] = (min(midnight, end) - start).total_seconds()
        start = midnight
    return found


async def add_usage(
    connection: AsyncConnection, owner: str, start: datetime, end: datetime, held: Resources
) -> None:
    """Add the usage of an ended attempt in the caller's transaction.

    Its statements must be the last ones.
    """
    # The clocks of two replicas may differ.
    await _add(connection, usage, {"owner": owner}, max((end - start).total_seconds(), 0.0), held)
    for day, seconds in seconds_by_day(start, end).items():
        await _add(connection, usage_days, {"owner": owner, "day": day}, seconds, held)


async def _add(
    connection: AsyncConnection, table: Table, key: dict[str, Any], seconds: float, held: Resources
) -> None:
    query = upsert(connection, table).values(**key, **asdict(Usage().add(seconds, held)))
    sums = {name: table.c[name] + query.excluded[name] for name in ("gpu_seconds", "cpu_seconds")}
    await connection.execute(query.on_conflict_do_update(index_elements=list(key), set_=sums))


async def add_stored_bytes(connection: AsyncConnection, owner: str, count: int) -> int:
    """Add to the stored bytes of an owner in the caller's transaction; return the sum."""
    query = upsert(connection, usage).values(
        owner=owner, gpu_seconds=0.0, cpu_seconds=0.0, stored_bytes=count
    )
    sums = {"stored_bytes": usage.c.stored_bytes + query.excluded.stored_bytes}
    query = query.on_conflict_do_update(index_elements=[usage.c.owner], set_=sums)
    return int((await connection.execute(query.returning(usage.c.stored_bytes))).scalar_one())


async def read_usage(
    connection: AsyncConnection, now: datetime, period: Period = Period()
) -> tuple[dict[str, Usage], dict[str, Usage]]:
    """Return the usage of each owner, with running attempts up to now and without."""
    active = select(jobs.c.owner, jobs.c.max_gpus, jobs.c.max_cpus, jobs.c.started_at).where(
        jobs.c.mlflow_closed.is_(False), jobs.c.state == JobState.RUNNING
    )
    # One statement sees one state: an attempt that ends meanwhile is counted once.
    rows: Sequence[Any] = (await connection.execute(union_all(_ended(period), active))).all()
    ended: dict[str, Usage] = {}
    found: dict[str, Usage] = {}
    for row in rows:
        held, seconds = Resources(row.cpu_seconds, row.gpu_seconds), 1.0
        if row.started_at is None:
            ended[row.owner] = Usage().add(seconds, held)
        else:
            days = seconds_by_day(row.started_at, now)
            seconds = sum(seconds for day, seconds in days.items() if period.includes(day))
        found[row.owner] = found.get(row.owner, Usage()).add(seconds, held)
    return found, ended


def _ended(period: Period) -> Select[Any]:
    """Query the sums of ended attempts by owner, without a start."""
    table = usage if period.is_unlimited else usage_days  # the first has what is older than the days
    sums = [func.sum(table.c[name]).label(name) for name in ("gpu_seconds", "cpu_seconds")]
    start = cast(null(), UtcDateTime).label("started_at")
    query = select(table.c.owner, *sums, start).group_by(table.c.owner)
    if period.since is not None:
        query = query.where(usage_days.c.day >= period.since)
    return query if period.until is None else query.where(usage_days.c.day < period.until)


@dataclass(frozen=True)
class Totals:
    """Totals of all jobs, and their usage."""

    jobs: dict[JobState, int]
    queued: dict[str, int]
    """Number of queued jobs by owner."""
    oldest_queued_at: datetime | None
    usage: dict[str, Usage]
    """Usage by owner, including deleted jobs."""
    ended_usage: dict[str, Usage]
    """The part of ended attempts, which never decreases."""


async def read_totals(connection: AsyncConnection, now: datetime) -> Totals:
    """Return the totals of all jobs."""
    states = select(jobs.c.state, func.count()).group_by(jobs.c.state)
    queued = (
        select(jobs.c.owner, func.count(), func.min(jobs.c.queued_at))
        .where(jobs.c.state == JobState.QUEUED, jobs.c.pause_requested.is_(False))
        .group_by(jobs.c.owner)
    )
    by_state, by_owner = [(await connection.execute(query)).all() for query in (states, queued)]
    return Totals(
        {JobState(state): count for state, count in by_state},
        {owner: count for owner, count, _ in by_owner},
        min((oldest for _, _, oldest in by_owner), default=None),
        *await read_usage(connection, now),
    )
