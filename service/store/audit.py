"""Audit records of actions that are not events of jobs."""

from dataclasses import fields
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.access import AuditRecord, Caller
from service.store.database import Database, read_page
from service.store.tables import audit

SERVICE = "service"
COLUMNS = [audit.c[field.name] for field in fields(AuditRecord)]


class AuditStore:
    """Audit records in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(self, size: int, before: int | None) -> tuple[list[AuditRecord], int | None]:
        """Return a page of records, newest first, and the place of the next page."""
        async with self._database.read() as connection:
            rows, more = await read_page(connection, select(*COLUMNS), audit.c.sequence, size, before)
        return [
            AuditRecord(**{field.name: getattr(row, field.name) for field in fields(AuditRecord)})
            for row in rows
        ], more


async def record(
    connection: AsyncConnection, actor: Caller | None, action: str, subject: str, detail: str, at: datetime
) -> None:
    """Store a record in the caller's transaction; without an actor it is the service."""
    values = {
        "at": at,
        "actor": actor.owner if actor else SERVICE,
        "token_id": actor.token_id if actor else None,
        "action": action,
        "subject": subject,
        "detail": detail,
    }
    await connection.execute(insert(audit).values(**values))
