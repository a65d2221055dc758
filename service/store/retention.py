"""Deletion of old jobs and of all rows that belong to them."""

from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, exists, func, insert, or_, select

from service.store.database import Database
from service.store.tables import comparisons, deleted_jobs, events, job_tags, jobs
from service.store.usage import add_stored_bytes
from service.store.webhooks import delete_deliveries


class RetentionStore:
    """Deletion of old jobs, and remaining folders, in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def delete_jobs(self, time: datetime, most: int) -> int:
        """Delete jobs that ended before `time`, oldest first, and return their number.

        With them go their events, tags and messages, and the comparisons that have no job left; their folders
        are `folders_left`. Not deleted are jobs that MLflow does not know the end of yet, those that another
        one was resumed from, as long as it is there, and those whose comparison has a job that stays, without
        which its report would be another one.
        """
        async with self._database.write() as connection:
            query = (
                _deletable(time)
                .order_by(jobs.c.ended_at)
                .limit(most)
                .with_for_update(of=jobs, skip_locked=True)
            )
            found = (await connection.execute(query)).scalars().all()
            # Looked at again now that they are locked: who resumes from a job locks it too, and may have just
            # done so.
            again = _deletable(time).where(jobs.c.id.in_(found))
            old = (await connection.execute(again)).scalars().all()
            if not old:
                return 0
            sizes = (
                select(jobs.c.owner, func.sum(jobs.c.stored_bytes))
                .where(jobs.c.id.in_(old))
                .group_by(jobs.c.owner)
            )
            for owner, size in (await connection.execute(sizes)).all():
                await add_stored_bytes(connection, owner, -int(size))
            await delete_deliveries(connection, old)
            for table, column in (
                (events, events.c.job_id),
                (job_tags, job_tags.c.job_id),
                (jobs, jobs.c.id),
            ):
                await connection.execute(delete(table).where(column.in_(old)))
            is_empty = ~exists().where(jobs.c.comparison_id == comparisons.c.id)
            await connection.execute(delete(comparisons).where(comparisons.c.mlflow_closed, is_empty))
            await connection.execute(insert(deleted_jobs), [{"id": job_id} for job_id in old])
            return len(old)

    async def folders_left(self) -> list[str]:
        """Return the ids of deleted jobs whose folders may still exist."""
        async with self._database.read() as connection:
            return list((await connection.execute(select(deleted_jobs.c.id))).scalars())

    async def delete_folder(self, job_id: str) -> None:
        """Record that the folder of a deleted job is gone."""
        async with self._database.write() as connection:
            await connection.execute(delete(deleted_jobs).where(deleted_jobs.c.id == job_id))


def _deletable(time: datetime) -> Select[Any]:
    other, later = jobs.alias(), jobs.alias()
    # The checkpoints may lie with the first of several jobs, so each keeps the one before it.
    is_resumed = exists().where(later.c.resumed_from == jobs.c.id)
    other_stays = or_(
        other.c.ended_at.is_(None),
        other.c.ended_at >= time,
        exists().where(later.c.resumed_from == other.c.id),
    )
    return select(jobs.c.id).where(
        jobs.c.ended_at < time,
        # Not is_(True), whose index SQLite would read through to its end, for each few that are deleted.
        jobs.c.mlflow_closed.is_not(False),
        ~is_resumed,
        ~exists().where(other.c.comparison_id == jobs.c.comparison_id, other_stays),
    )
