"""Replicas and their leases in the database."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.leases import Lease, share_of
from service.store.database import Database
from service.store.tables import leases, replicas

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class LeaseStore:
    """Leases in the database, by its clock, so that clocks of replicas need not agree."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep(self, replica: str, seconds: float) -> Mapping[str, Lease]:
        """Record a heartbeat of `replica` and renew its leases; return all by name.

        Takes free leases up to its share, and releases the rest.
        """
        async with self._database.write() as connection:
            # Replicas go through here one after the other, so that no two take the same lease.
            rows = (await connection.execute(select(leases).order_by(leases.c.name).with_for_update())).all()
            now = await _now(connection)
            await connection.execute(delete(replicas).where(replicas.c.id == replica))
            await connection.execute(insert(replicas).values(id=replica, seen_at=now))
            await connection.execute(
                delete(replicas).where(replicas.c.seen_at < now - timedelta(seconds=seconds))
            )
            alive = (await connection.execute(select(replicas.c.id))).scalars().all()
            share, held = share_of(replica, alive), dict[str, Lease]()
            for row in rows:
                is_mine = row.holder == replica and row.until > now
                if row.name in share and (is_mine or row.until <= now):
                    token = row.token if is_mine else row.token + 1
                    values = {"holder": replica, "token": token, "until": now + timedelta(seconds=seconds)}
                    held[row.name] = Lease(row.name, token)
                elif is_mine:
                    values = {"holder": None, "until": LONG_AGO}
                else:
                    continue
                await connection.execute(update(leases).where(leases.c.name == row.name).values(**values))
        return held

    async def release(self, replica: str) -> None:
        """Release all leases of a replica."""
        async with self._database.write() as connection:
            # In the order of `keep`, or the two could wait for each other.
            await connection.execute(select(leases.c.name).order_by(leases.c.name).with_for_update())
            await connection.execute(
                update(leases).where(leases.c.holder == replica).values(holder=None, until=LONG_AGO)
            )
            await connection.execute(delete(replicas).where(replicas.c.id == replica))

    async def seconds_since_seen(self) -> dict[str, float]:
        """Return the age of each replica's last heartbeat."""
        async with self._database.read() as connection:
            now = await _now(connection)
            rows = (await connection.execute(select(replicas))).all()
        return {row.id: (now - row.seen_at).total_seconds() for row in rows}


def is_held(lease: Lease) -> ColumnElement[bool]:
    """Return the condition that a lease is still held, for guarded updates."""
    return exists().where(leases.c.name == lease.name, leases.c.token == lease.token)


async def _now(connection: AsyncConnection) -> datetime:
    if connection.dialect.name == "sqlite":  # whose clock is this machine's, in whole seconds
        return datetime.now(UTC)
    now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    return now
