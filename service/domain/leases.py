"""Leases: division of work among replicas.

The work is cut into parts, each under its own lease. A lease that was not renewed in time is free for
others, and each new holder gets a token larger than the one before: what a holder that was away writes with
its old token is refused (fencing; Kleppmann 2016, How to do distributed locking).
"""

from collections.abc import Collection
from dataclasses import dataclass
from zlib import crc32

SCHEDULER = "scheduler"
"""Lease of the replica that admits jobs; only one may count free resources."""
SHARDS = 8
"""Number of shards of the jobs; each is reconciled by one replica."""
LEASES = (SCHEDULER, *(f"shard-{number}" for number in range(SHARDS)))


@dataclass(frozen=True)
class Lease:
    """Time-limited ownership of a part of the work."""

    name: str
    token: int


def shard_of(job_id: str) -> int:
    """Return the shard of a job."""
    return crc32(job_id.encode()) % SHARDS


def share_of(replica: str, alive: Collection[str]) -> frozenset[str]:
    """Return the leases that a replica should hold, given the live replicas."""
    order = sorted({*alive, replica})
    return frozenset(LEASES[order.index(replica) :: len(order)])
