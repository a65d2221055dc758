"""Comparisons in the database."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import insert, select, update

from service.domain.comparisons import Comparison
from service.domain.errors import NotFound
from service.domain.jobs import Job
from service.store.database import Database
from service.store.job_inserts import insert_jobs
from service.store.tables import comparisons

COLUMNS = [comparisons.c[field.name] for field in fields(Comparison)]


class ComparisonStore:
    """Comparisons in the database."""

    def __init__(self, database: Database, max_stored_bytes: int | None = None) -> None:
        """`max_stored_bytes` limits the stored jobs of an owner; None means no limit."""
        self._database, self._max_stored_bytes = database, max_stored_bytes

    async def add(self, comparison: Comparison, jobs: Sequence[Job]) -> None:
        """Store a comparison and its jobs in one transaction. Raises QuotaExceeded."""
        async with self._database.write() as connection:
            await connection.execute(insert(comparisons).values(**asdict(comparison)))
            await insert_jobs(connection, jobs, self._max_stored_bytes)

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

    async def open_jobs(self) -> list[Comparison]:
        """Return the comparisons whose parent run is not closed in MLflow."""
        async with self._database.read() as connection:
            rows = (await connection.execute(select(*COLUMNS).where(comparisons.c.mlflow_closed.is_(False)))).all()
        return [Comparison(**row._asdict()) for row in rows]

    async def note(self, comparison_id: str, **changes: Any) -> None:
        """Update fields of a comparison."""
        assert changes.keys() <= {"mlflow_run_id", "mlflow_experiment_id", "mlflow_closed"}, changes
        async with self._database.write() as connection:
            await connection.execute(update(comparisons).where(comparisons.c.id == comparison_id).values(**changes))
