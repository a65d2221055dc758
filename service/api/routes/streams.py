"""Server-sent events of a job's log and timeline, resumable after a break."""

import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import TypeAdapter
from starlette.types import Receive, Scope, Send

from service.adapters.job_log import AttemptLog, Line, LogOffset, Selection
from service.adapters.run_storage import RunFiles, on_threads
from service.api.schemas import EventView
from service.api.subscriptions import JobFeed
from service.domain.access import Caller
from service.domain.jobs import Job
from service.store.jobs import JobSnapshot, JobStore

MEDIA_TYPE = "text/event-stream"
LOG_POLL_INTERVAL_SECONDS = 0.5
"""Interval at which a log file is read; the state of jobs is polled for all streams together."""
KEEPALIVE_INTERVAL_SECONDS = 15.0
"""Interval of comments that keep the connection open through proxies."""
PROGRESS_INTERVAL_SECONDS = 1.0
"""Minimum interval between two states of a progress bar."""
LINES_AT_ONCE = 200
READERS = ThreadPoolExecutor(32, thread_name_prefix="log")
"""Threads for reading logs only, so that a storage that hangs does not block other work."""
JSON = TypeAdapter(Any)


def described(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a stream's events, of which `end` is the last."""
    fields = {
        "event": {"enum": [*kinds, "end"]},
        "id": {"type": "string", "description": "to go on after, as `Last-Event-ID`"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    }
    return {200: {"content": {MEDIA_TYPE: {"schema": {"type": "object", "properties": fields}}}}}


def event(data: Any, *, kind: str | None = None, place: object = None) -> bytes:
    """Encode one event."""
    text = JSON.dump_json(data).decode()
    return format_sse_event(data_str=text, event=kind, id=None if place is None else str(place))


class Stream(StreamingResponse):
    """Stream of events, counted per token. Raises HTTPException with 429."""

    def __init__(self, feed: JobFeed, caller: Caller, events: AsyncIterator[bytes]) -> None:
        if not feed.open_stream(caller.token_id):
            detail = (
                "this token follows as many logs and timelines as it may; end one of them, or list "
                "without `follow`"
            )
            raise HTTPException(429, detail, headers={"Retry-After": "5"})
        self._feed, self._token_id = feed, caller.token_id
        super().__init__(events, media_type=MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end of the stream or the connection."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.close_stream(self._token_id)


SIGN_OF_LIFE = format_sse_event(comment="still here")


async def read_log(
    files: RunFiles, job: Job, place: LogOffset, wanted: Selection
) -> AsyncIterator[list[Line]]:
    """Yield the current lines of an attempt's log in batches."""
    log = AttemptLog(files.attempt_folder(job, place.attempt), place)
    async for lines in _in_parts(log.read(is_over=True)):
        yield [line for line in lines if wanted.matches(line)]


async def follow_log(
    feed: JobFeed, files: RunFiles, caller: Caller, job: Job, place: LogOffset, wanted: Selection
) -> AsyncIterator[bytes]:
    """Stream the log of a job from an offset until the job or the token ends."""
    with feed.subscribe(job.id):
        snapshot = JobSnapshot(job.version, job.state, job.attempt, job.progress)
        log = AttemptLog(files.attempt_folder(job, place.attempt), place)
        spoke_at = looked_at = time.monotonic()
        unfinished: list[Line] = []
        while not feed.is_over(caller.token_id):
            # What is over before the file is read grows no more after it.
            is_over = snapshot.state.is_terminal or log.place.attempt < snapshot.attempt
            async for lines in _in_parts(log.read(is_over=is_over)):
                if feed.is_over(caller.token_id):
                    return
                for line in filter(wanted.matches, lines):
                    yield event(_content(line), kind="line", place=line.place)
                    spoke_at = time.monotonic()
            if is_over and log.place.attempt < snapshot.attempt:
                start = LogOffset(log.place.attempt + 1)
                log = AttemptLog(files.attempt_folder(job, start.attempt), start)
                continue
            if is_over:
                yield event({"state": snapshot.state}, kind="end", place=log.place)
                return
            if time.monotonic() - looked_at > PROGRESS_INTERVAL_SECONDS:
                before, looked_at = unfinished, time.monotonic()
                unfinished = await on_threads(READERS, log.unfinished)
                for line in unfinished:
                    if wanted.matches(line) and line not in before:
                        yield event(_content(line), kind="unfinished")
                        spoke_at = looked_at
            if time.monotonic() - spoke_at > KEEPALIVE_INTERVAL_SECONDS:
                yield SIGN_OF_LIFE
                spoke_at = time.monotonic()
            snapshot = (
                await feed.wait_for_change(job.id, snapshot, caller.token_id, LOG_POLL_INTERVAL_SECONDS)
                or snapshot
            )


async def follow_events(
    feed: JobFeed, jobs: JobStore, caller: Caller, job: Job, after: int
) -> AsyncIterator[bytes]:
    """Stream state changes after number `after`, and progress.

    The stream ends when the job or the token does.
    """
    with feed.subscribe(job.id):
        snapshot: JobSnapshot | None = None
        while not feed.is_over(caller.token_id):
            seen = await jobs.events_of(job.id, after)
            for found in seen:
                after = found.sequence
                yield event(EventView.model_validate(found), kind="transition", place=after)
            if snapshot is not None and snapshot.progress is not None:
                yield event(snapshot.progress, kind="progress")
            if (snapshot.state if snapshot else job.state).is_terminal:
                # The end and its event are one transaction, so the event has been read by now.
                yield event({"state": snapshot.state if snapshot else job.state}, kind="end", place=after)
                return
            news = await feed.wait_for_change(job.id, snapshot, caller.token_id, KEEPALIVE_INTERVAL_SECONDS)
            if news == snapshot:
                yield SIGN_OF_LIFE
            snapshot = news


def _content(line: Line) -> dict[str, Any]:
    return {"rank": line.rank, "level": line.level, "text": line.text}


async def _in_parts(lines: Iterator[Line]) -> AsyncIterator[list[Line]]:
    """Read a batch of lines in a thread. Raises UpstreamUnavailable after a timeout."""
    while part := await on_threads(READERS, lambda: list(islice(lines, LINES_AT_ONCE))):
        yield part
