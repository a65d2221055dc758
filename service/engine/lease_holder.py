"""Leases of this replica, renewed while it lives."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from service.domain.errors import UpstreamUnavailable
from service.domain.leases import SCHEDULER, Lease, shard_of
from service.store.leases import LeaseStore

logger = logging.getLogger(__name__)
RENEWALS = 3
"""Times that a lease is renewed before it would run out."""


class Replica:
    """Holder of leases.

    A former process of the same name must have ended, since its leases are taken over.
    """

    def __init__(self, leases: LeaseStore, name: str, lease_seconds: float) -> None:
        self._leases, self.name, self._lease_seconds = leases, name, lease_seconds
        self._held: Mapping[str, Lease] = {}
        self._renewed_at = 0.0

    async def start(self) -> None:
        """Take the leases of a former process of this name under new tokens, and a share of the rest."""
        await self._leases.release(self.name)
        await self.renew()

    @property
    def is_alive(self) -> bool:
        """Whether the leases still hold."""
        return time.monotonic() - self._renewed_at <= self._lease_seconds

    async def run(self, is_stuck: Callable[[], bool]) -> None:
        """Renew the leases until cancelled, unless the work hangs, and then release them."""
        try:
            while True:
                await asyncio.sleep(self._lease_seconds / RENEWALS)
                if is_stuck():
                    logger.critical("the dispatcher is stuck; its work is left to other replicas")
                    continue
                try:
                    await self.renew()
                except (
                    Exception
                ) as error:  # of whatever kind: without leases this replica would do nothing, and say nothing
                    known = isinstance(error, UpstreamUnavailable)
                    logger.warning("leases could not be renewed: %s", error, exc_info=not known)
        finally:
            self._held = {}
            try:
                await self._leases.release(self.name)
            except UpstreamUnavailable as error:
                logger.warning("leases could not be given back, and run out by themselves: %s", error)

    async def renew(self) -> None:
        """Renew the leases once."""
        began = time.monotonic()
        self._held = await self._leases.keep(self.name, self._lease_seconds)
        self._renewed_at = began

    def lease(self, name: str) -> Lease | None:
        """Return a lease if this replica holds it."""
        return self._held.get(name) if self.is_alive else None

    def scheduler(self) -> Lease | None:
        """Scheduler lease, if held."""
        return self.lease(SCHEDULER)

    def of_job(self, job_id: str) -> Lease | None:
        """Return the lease of a job's shard, if held."""
        return self.lease(f"shard-{shard_of(job_id)}")

    def shards(self) -> set[int]:
        """Return the shards that this replica reconciles."""
        return {int(name.removeprefix("shard-")) for name in self._held if name != SCHEDULER and self.lease(name)}
