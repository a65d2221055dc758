"""Retries of attempts: which failures, how often, with which pauses."""

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from pydantic import Field

from trainer.jobspec import Cause, FrozenModel

FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=2), timedelta(minutes=5)
"""Before another attempt."""


class Blame(StrEnum):
    """Whose fault the end of an attempt was: each has tries of its own, so that none uses up another's."""

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
    """How many more attempts a job gets, by whom an end is blamed on. What is the user's own mistake would only recur."""

    infrastructure: int = Field(5, ge=0, le=1_000, description="after a lost worker, driver, node or cluster")
    preempted: int = Field(100, ge=0, le=10_000, description="after a node was taken away with notice")
    hang: int = Field(2, ge=0, le=1_000, description="after workers waited for each other in vain")
    unknown: int = Field(1, ge=0, le=1_000, description="after a failure whose cause is not known")

    def allowed(self, blame: Blame) -> int:
        """Attempts after the first that may be spent on ends of this kind."""
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
    """How long to wait after so many ends of one kind: twice as long after each, up to a limit."""
    return min(FIRST_PAUSE * int(2 ** min(failures - 1, 16)), LONGEST_PAUSE)


@dataclass(frozen=True)
class Failures:
    """Ends of attempts so far, by whom they are blamed on."""

    counts: dict[Blame, int] = field(default_factory=dict)

    def increment(self, blame: Blame) -> "Failures":
        """These and one more."""
        return Failures(self.counts | {blame: self.counts.get(blame, 0) + 1})

    def of(self, blame: Blame) -> int:
        """How many of one kind."""
        return self.counts.get(blame, 0)
