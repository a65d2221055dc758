"""What retention deletes: jobs that ended long ago, with all that hangs on them."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, exists, or_, select

from service.domain.jobs import JobState
from service.store.database import Database
from service.store.tables import comparisons, events, job_tags, jobs
from service.store.webhooks import forget_deliveries


class RetentionStore:
    """Queries about old jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def jobs_ended_before(self, time: datetime, most: int) -> list[str]:
        """Find jobs that may be deleted, the oldest first.

        Not among them are jobs that MLflow does not know the end of yet, those whose comparison has a younger job, without
        which its report would be another one, and those whose checkpoints a job that has not ended may still go on from.
        """
        other = jobs.alias()
        is_young = or_(other.c.ended_at.is_(None), other.c.ended_at >= time)
        ended = [state.value for state in JobState if state.is_terminal]
        query = (
            select(jobs.c.id)
            .where(
                jobs.c.ended_at < time,
                jobs.c.mlflow_closed.is_(True),
                ~exists().where(other.c.comparison_id == jobs.c.comparison_id, is_young),
                ~exists().where(other.c.resumed_from == jobs.c.id, other.c.state.not_in(ended)),
            )
            .order_by(jobs.c.ended_at)
            .limit(most)
        )
        async with self._database.read() as connection:
            return list((await connection.execute(query)).scalars())

    async def forget_jobs(self, job_ids: Sequence[str]) -> None:
        """Delete jobs with their events, tags and messages, and the comparisons that have no job left."""
        async with self._database.write() as connection:
            await forget_deliveries(connection, job_ids)
            for table, column in ((events, events.c.job_id), (job_tags, job_tags.c.job_id), (jobs, jobs.c.id)):
                await connection.execute(delete(table).where(column.in_(job_ids)))
            is_empty = ~exists().where(jobs.c.comparison_id == comparisons.c.id)
            await connection.execute(delete(comparisons).where(comparisons.c.mlflow_closed, is_empty))
