"""Comparisons in the database."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import func, insert, select, update

from service.domain.comparisons import Comparison, size_of
from service.domain.errors import NotFound
from service.domain.jobs import Job, JobState
from service.store.database import Database, read_page
from service.store.job_inserts import insert_jobs
from service.store.tables import comparisons, jobs

COLUMNS = [comparisons.c[field.name] for field in fields(Comparison)]
LISTED_COLUMNS = [column for column in COLUMNS if column.name != "recipe"]
"""Columns in lists; a recipe may be large."""
NAMES = [column.name for column in LISTED_COLUMNS]


@dataclass(frozen=True)
class ListedComparison:
    """Comparison without its recipe, and numbers of its jobs by state."""

    comparison: Comparison
    jobs: dict[JobState, int]


class ComparisonStore:
    """Comparisons in the database."""

    def __init__(self, database: Database, max_stored_bytes: int | None = None) -> None:
        """`max_stored_bytes` limits the stored jobs of an owner; None means no limit."""
        self._database, self._max_stored_bytes = database, max_stored_bytes

    async def add(self, comparison: Comparison, points: Sequence[Job]) -> None:
        """Store a comparison and its jobs in one transaction. Raises QuotaExceeded."""
        first = select(func.min(jobs.c.sequence)).where(jobs.c.comparison_id == comparison.id)
        async with self._database.write() as connection:
            await connection.execute(insert(comparisons).values(**asdict(comparison)))
            more = 0 if comparison.recipe is None else size_of(comparison.recipe)
            await insert_jobs(connection, points, self._max_stored_bytes, more_bytes=more)
            await connection.execute(
                update(comparisons)
                .where(comparisons.c.id == comparison.id)
                .values(first_job_sequence=first.scalar_subquery())
            )

    async def get(self, comparison_id: str, owner: str | None = None) -> Comparison:
        """Return a comparison. Raises NotFound, also if it is not `owner`'s."""
        query = select(*COLUMNS).where(comparisons.c.id == comparison_id)
        if owner is not None:
            query = query.where(comparisons.c.owner == owner)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"there is no comparison {comparison_id!r}")
        return Comparison(**row._asdict())

    async def page(
        self, size: int, before: int | None, owner: str | None = None
    ) -> tuple[list[ListedComparison], int | None]:
        """Return a page of comparisons, newest first, and the place of the next page."""
        query = select(*LISTED_COLUMNS)
        query = query if owner is None else query.where(comparisons.c.owner == owner)
        async with self._database.read() as connection:
            rows, more = await read_page(connection, query, comparisons.c.first_job_sequence, size, before)
            found = [Comparison(**{name: row._mapping[name] for name in NAMES}) for row in rows]
            states = (
                select(jobs.c.comparison_id, jobs.c.state, func.count().label("count"))
                .where(jobs.c.comparison_id.in_([comparison.id for comparison in found]))
                .group_by(jobs.c.comparison_id, jobs.c.state)
            )
            counts: dict[str, dict[JobState, int]] = {}
            for row in (await connection.execute(states)).all():
                counts.setdefault(row.comparison_id, {})[JobState(row.state)] = row._mapping["count"]
        return [ListedComparison(each, counts.get(each.id, {})) for each in found], more

    async def open_comparisons(self) -> list[Comparison]:
        """Return the comparisons whose parent run is not closed in MLflow."""
        async with self._database.read() as connection:
            rows = (
                await connection.execute(select(*COLUMNS).where(comparisons.c.mlflow_closed.is_(False)))
            ).all()
        return [Comparison(**row._asdict()) for row in rows]

    async def update_fields(self, comparison_id: str, **changes: Any) -> None:
        """Update fields of a comparison."""
        assert changes.keys() <= {"mlflow_run_id", "mlflow_experiment_id", "mlflow_closed"}, changes
        async with self._database.write() as connection:
            await connection.execute(
                update(comparisons).where(comparisons.c.id == comparison_id).values(**changes)
            )
