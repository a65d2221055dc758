"""Keys by which requests are known again, and the answers that they got."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import delete, select, update

from service.domain.errors import InFlight
from service.store.database import Database, insert_into, is_first
from service.store.tables import idempotency_keys as keys

IN_FLIGHT = "Idempotency-Key: the first request with this key has not been answered yet"


@dataclass(frozen=True)
class StoredAnswer:
    """What the first request of a key was, and what it was answered."""

    fingerprint: str
    status: int
    headers: dict[str, str]
    body: bytes


class IdempotencyStore:
    """Queries about keys. Inside `Database.transaction()` a key is stored with all that its request stores, or not at all."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, owner: str, key: str) -> StoredAnswer | None:
        """Read what a key's request was answered; None if it has not been answered yet."""
        query = select(keys).where(keys.c.owner == owner, keys.c.key == key)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else StoredAnswer(row.fingerprint, row.status, row.headers, row.body)

    async def claim(self, owner: str, key: str, fingerprint: str) -> StoredAnswer | None:
        """Take a key, which is free again if the transaction is rolled back; if it is taken, return what it was answered.

        Raises InFlight while another replica's transaction holds the key; on SQLite, which has one writer, this waits for its end.
        """
        # What is not known yet is seen by nobody: the answer follows in the same transaction.
        claim = {"fingerprint": fingerprint, "status": 0, "headers": {}, "body": b"", "created_at": datetime.now(UTC)}
        async with self._database.write() as connection:
            if not await is_first(connection, f"{owner} {key}"):
                raise InFlight(IN_FLIGHT)
            query = insert_into(connection, keys).values(owner=owner, key=key, **claim).on_conflict_do_nothing()
            if (await connection.execute(query)).rowcount:
                return None
            return await self.find(owner, key)

    async def store(self, owner: str, key: str, answer: StoredAnswer) -> None:
        """Keep the answer to the request that has claimed a key."""
        values = {"status": answer.status, "headers": answer.headers, "body": answer.body}
        async with self._database.write() as connection:
            await connection.execute(update(keys).where(keys.c.owner == owner, keys.c.key == key).values(**values))

    async def forget_before(self, time: datetime) -> int:
        """Delete the keys that are older; return how many. Clients may count on a key for 24 hours."""
        async with self._database.write() as connection:
            return (await connection.execute(delete(keys).where(keys.c.created_at < time))).rowcount
