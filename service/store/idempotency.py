"""Idempotency keys and their stored responses."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, bindparam, delete, func, insert, literal, select, true
from sqlalchemy.exc import IntegrityError

from service.domain.errors import RequestInProgress
from service.store.database import Database
from service.store.tables import idempotency_keys as keys

IS_IT = and_(keys.c.owner == bindparam("owner"), keys.c.key == bindparam("key"))


def _taking(is_ours: ColumnElement[bool]) -> Select[Any]:
    """Statement that takes a key and returns the fingerprint of its earlier request."""
    one = select(literal(1)).subquery()
    return select(is_ours, keys.c.fingerprint).select_from(one.outerjoin(keys, IS_IT))


BY_KEY, KEEP = select(keys).where(IS_IT), insert(keys)
TAKE = {
    "postgresql": _taking(func.pg_try_advisory_xact_lock(func.hashtextextended(bindparam("name"), 0))),
    "sqlite": _taking(true()),  # which has one writer
}
"""Statement, compiled once: compiling takes about as long as running it."""
IN_FLIGHT = "Idempotency-Key: the first request with this key has not been answered yet"


@dataclass(frozen=True)
class StoredAnswer:
    """First request of a key, and its stored response."""

    fingerprint: str
    status: int
    headers: dict[str, str]
    body: bytes


class IdempotencyStore:
    """Idempotency keys in the database, stored in the transaction of their request."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, owner: str, key: str) -> StoredAnswer | None:
        """Return the stored response of a key, or None."""
        async with self._database.read() as connection:
            row = (await connection.execute(BY_KEY, {"owner": owner, "key": key})).one_or_none()
        return None if row is None else StoredAnswer(row.fingerprint, row.status, row.headers, row.body)

    async def take(self, owner: str, key: str) -> None:
        """Take a key until the end of the transaction. Raises RequestInProgress."""
        async with self._database.write() as connection:
            named = {"owner": owner, "key": key, "name": f"{owner} {key}"}
            is_ours, before = (await connection.execute(TAKE[connection.dialect.name], named)).one()
            if not is_ours or before is not None:
                raise RequestInProgress(IN_FLIGHT)

    async def store(self, owner: str, key: str, answer: StoredAnswer) -> None:
        """Store the response of a request.

        Raises RequestInProgress if there is one; then roll back.
        """
        row = asdict(answer) | {"owner": owner, "key": key, "created_at": datetime.now(UTC)}
        async with self._database.write() as connection:
            try:
                await connection.execute(KEEP, row)
            except IntegrityError:
                raise RequestInProgress(IN_FLIGHT) from None

    async def delete_before(self, time: datetime) -> int:
        """Delete older keys and return their number. Keys are guaranteed for 24 hours."""
        async with self._database.write() as connection:
            return (await connection.execute(delete(keys).where(keys.c.created_at < time))).rowcount
