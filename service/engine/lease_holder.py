"""Leases of this replica, renewed while it lives."""

import logging
import time
from collections.abc import Callable, Mapping

from service.domain.errors import UpstreamUnavailable
from service.domain.leases import SCHEDULER, Lease, shard_of
from service.engine.background import periodic
from service.store.leases import LeaseStore

logger = logging.getLogger(__name__)
RENEWALS = 3
"""Number of renewals before a lease would expire."""


class LeaseHolder:
    """Holder of leases.

    A former process of the same name must have ended, since its leases are taken over.
    """

    def __init__(self, leases: LeaseStore, name: str, lease_seconds: float) -> None:
        self._leases, self.name, self._lease_seconds = leases, name, lease_seconds
        self._held: Mapping[str, Lease] = {}
        self._renewed_at = 0.0

    async def start(self) -> None:
        """Take leases under new tokens.

        These are the leases of a former process of this name, and a share of the rest.
        """
        await self._leases.release(self.name)
        await self.renew()

    @property
    def is_alive(self) -> bool:
        """Whether the leases still hold."""
        return time.monotonic() - self._renewed_at <= self._lease_seconds

    async def run(self, is_stuck: Callable[[], bool]) -> None:
        """Renew the leases until cancelled, unless the work hangs, and then release them."""

        async def renew() -> None:
            if is_stuck():
                logger.critical("the dispatcher is stuck; its jobs are left to other replicas")
            else:
                await self.renew()

        try:
            await periodic("renewal of the leases", renew, self._lease_seconds / RENEWALS)
        finally:
            # First, so that nothing acts on a lease while it is being released.
            self._held = {}
            try:
                await self._leases.release(self.name)
            except UpstreamUnavailable as error:
                logger.warning("leases could not be released, and expire: %s", error)

    async def renew(self) -> None:
        """Renew the leases once."""
        # Measured before the call: the database counts the lease from a time at or after this one.
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
        return {
            int(name.removeprefix("shard-")) for name in self._held if name != SCHEDULER and self.lease(name)
        }
