"""Insertion of new jobs, with their tags and first events."""

from collections.abc import Sequence

from sqlalchemy import Connection, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.comparisons import size_of
from service.domain.errors import QuotaExceeded
from service.domain.jobs import Job
from service.store.job_rows import event_row, job_row
from service.store.tables import events, job_tags, jobs
from service.store.usage import add_stored_bytes

INSERT_JOBS, INSERT_EVENTS, INSERT_TAGS = (
    insert(jobs).returning(jobs.c.id, jobs.c.sequence),
    insert(events),
    insert(job_tags),
)
"""Statements, compiled once: compiling takes about as long as running them."""
INSERTED_AT_ONCE = 32
BYTES_BESIDE_SPEC = 1_000
"""Approximate size of a job in the database without its spec and variant."""


async def insert_jobs(
    connection: AsyncConnection,
    new: Sequence[Job],
    max_stored_bytes: int | None = None,
    *,
    more_bytes: int = 0,
) -> None:
    """Store new jobs of one owner in the caller's transaction. Raises QuotaExceeded.

    `more_bytes` is the size of what is stored and deleted with them; it counts with the first job.
    """
    first_id = new[0].id

    def insert_some(connection: Connection, some: Sequence[Job]) -> int:
        tags_of = {job.id: job.tags for job in some}
        contents = [
            job_row(job) | {"stored_bytes": _stored_bytes(job) + more_bytes * (job.id == first_id)}
            for job in some
        ]
        # RETURNING may have another order than VALUES, so rows are matched by id.
        rows = connection.execute(INSERT_JOBS, contents).all()
        connection.execute(INSERT_EVENTS, [event_row(job, job.created_at, job.owner) for job in some])
        tags = [
            {"tag": tag, "job_sequence": row.sequence, "job_id": row.id}
            for row in rows
            for tag in tags_of[row.id]
        ]
        if tags:
            connection.execute(INSERT_TAGS, tags)
        return sum(int(content["stored_bytes"]) for content in contents)

    size = 0
    for first in range(0, len(new), INSERTED_AT_ONCE):  # other requests are answered in between
        size += await connection.run_sync(insert_some, new[first : first + INSERTED_AT_ONCE])
    stored = await add_stored_bytes(connection, new[0].owner, size)
    if max_stored_bytes is not None and stored > max_stored_bytes:
        raise QuotaExceeded(
            f"the jobs of {new[0].owner} would take {stored:,} bytes in the database; at most "
            f"{max_stored_bytes:,} are allowed. "
            "Retention deletes ended jobs, and the operator sets SYNCBN_QUOTA_STORED_BYTES"
        )


def _stored_bytes(job: Job) -> int:
    """Return the approximate size of a job and its events in the database."""
    return len(job.spec.model_dump_json()) + size_of(job.variant) + BYTES_BESIDE_SPEC
