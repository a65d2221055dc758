"""Server-sent events of logs and timelines, resumed after breaks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import httpx
from httpx_sse import ServerSentEvent
from pydantic import BaseModel

from service.api.schemas import EventView
from service.client.call import Call
from service.client.calls import Level
from service.client.retry import ApiError, Retrier
from service.domain.jobs import JobState
from trainer.jobspec import Progress

SILENCE_TIMEOUT_SECONDS = 45.0
"""Time without data after which a connection is considered dead; the service sends a comment every 15
seconds.
"""
MIN_HEALTHY_SECONDS = 15.0
"""Lifetime after which a connection counts as healthy, even if it delivered no event."""


class LogLine(BaseModel):
    """Line of a log."""

    rank: int | None
    """Rank of the worker that printed the line; None for the driver."""
    level: Level
    text: str


class UnfinishedLine(LogLine):
    """Current text of a line that a progress bar overwrites, until the next event."""


class Ended(BaseModel):
    """Last event of every stream: the job has ended."""

    state: JobState


E = TypeVar("E", bound=BaseModel)


@dataclass(frozen=True)
class Stream(Generic[E]):
    """Description of a stream and its events."""

    call: Call[None]
    kinds: Mapping[str, type[E]]
    """Parsers of events by event name; other events are skipped."""


class SseCursor(Generic[E]):
    """Position of a stream over all its connections."""

    def __init__(self, stream: Stream[E], retrier: Retrier) -> None:
        self._stream, self._retrier = stream, retrier
        self._last_id = ""
        self._answer: httpx.Response | None = None
        self._opened_at, self._has_taken = 0.0, False
        self.is_over = False

    def call(self) -> Call[None]:
        """Return the call that resumes the stream."""
        headers = {"Accept": "text/event-stream"} | (
            {"Last-Event-ID": self._last_id} if self._last_id else {}
        )
        self._answer, self._opened_at, self._has_taken = None, time.monotonic(), False
        return replace(self._stream.call, headers=headers)

    def open(self, answer: httpx.Response) -> None:
        """Start a connection."""
        self._answer = answer

    def take(self, event: ServerSentEvent) -> E | None:
        """Parse an event. Raises ValidationError."""
        kind = self._stream.kinds.get(event.event)
        taken = None if kind is None else kind.model_validate_json(event.data)
        self._last_id, self._has_taken = event.id or self._last_id, True
        self.is_over = isinstance(taken, Ended)
        return taken

    def next_delay(self, error: ApiError) -> float:
        """Return the seconds until the next connection.

        Raise the error after too many failures.
        """
        has_spoken = self._answer is not None and self._answer.num_bytes_downloaded > 0
        # A job that prints nothing gets only comments. Such a connection is healthy too, but one that breaks
        # immediately after the header must not be retried without end.
        if self._has_taken or (has_spoken and time.monotonic() - self._opened_at >= MIN_HEALTHY_SECONDS):
            self._retrier.reset()
        return self._retrier.next_delay(error)


def follow_logs(
    job_id: str,
    *,
    attempt: int | None = None,
    rank: int | None = None,
    level: Level | None = None,
    unfinished: bool = False,
) -> Stream[LogLine | Ended]:
    """Yield the lines of a job's log as they are written, and then `Ended`.

    The log includes all attempts. With `unfinished`, also yields `UnfinishedLine`, at most once a second.
    """
    kinds: dict[str, type[LogLine | Ended]] = {"line": LogLine, "end": Ended}
    if unfinished:
        kinds["unfinished"] = UnfinishedLine
    query = {"follow": True, "attempt": attempt, "rank": rank, "level": level}
    return Stream(_call("/v1/jobs/{job_id}/logs", job_id, query), kinds)


def follow_events(job_id: str) -> Stream[EventView | Progress | Ended]:
    """Yield state changes and progress of a job as they happen, and then `Ended`."""
    call = _call("/v1/jobs/{job_id}/events", job_id, {"follow": True})
    return Stream(call, {"transition": EventView, "progress": Progress, "end": Ended})


def _call(route: str, job_id: str, query: Mapping[str, object]) -> Call[None]:
    return Call(method="GET", route=route, path={"job_id": job_id}, query=query, read=lambda _: None)
