"""Retries of attempts: which failures, how often, with which pauses."""

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from pydantic import Field

from trainer.jobspec import Cause, FrozenModel

FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=2), timedelta(minutes=5)
"""Before another attempt."""


class Blame(StrEnum):
    """Failure kinds that are retried separately."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    PREEMPTED = "preempted"
    HANG = "hang"
    UNKNOWN = "unknown"


BLAME: dict[Cause, Blame] = {
    "user_code": Blame.USER,
    "configuration": Blame.USER,
    "data": Blame.USER,
    "out_of_memory": Blame.USER,
    "worker_lost": Blame.INFRASTRUCTURE,
    "preempted": Blame.PREEMPTED,
    "hang": Blame.HANG,
    "export": Blame.UNKNOWN,
    "unknown": Blame.UNKNOWN,
}
"""Who is to blame for each cause; to diverge is a result, and nobody's fault."""


class Retries(FrozenModel):
    """Numbers of retries per failure kind. Failures of the user are not retried."""

    infrastructure: int = Field(5, ge=0, le=1_000, description="after a lost worker, driver, node or cluster")
    preempted: int = Field(100, ge=0, le=10_000, description="after a node was taken away with notice")
    hang: int = Field(2, ge=0, le=1_000, description="after workers waited for each other in vain")
    unknown: int = Field(1, ge=0, le=1_000, description="after a failure whose cause is not known")

    def allowed(self, blame: Blame) -> int:
        """Return the number of retries for a kind."""
        match blame:
            case Blame.INFRASTRUCTURE:
                return self.infrastructure
            case Blame.PREEMPTED:
                return self.preempted
            case Blame.HANG:
                return self.hang
            case Blame.UNKNOWN:
                return self.unknown
            case Blame.USER:
                return 0


def pause(failures: int) -> timedelta:
    """Return the pause after a number of failures of one kind: exponential, up to a limit."""
    return min(FIRST_PAUSE * int(2 ** min(failures - 1, 16)), LONGEST_PAUSE)


@dataclass(frozen=True)
class Failures:
    """Numbers of failures so far per kind."""

    counts: dict[Blame, int] = field(default_factory=dict)

    def increment(self, blame: Blame) -> "Failures":
        """Return the numbers with one more failure."""
        return Failures(self.counts | {blame: self.counts.get(blame, 0) + 1})

    def of(self, blame: Blame) -> int:
        """Return the number of failures of one kind."""
        return self.counts.get(blame, 0)
