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
from service.adapters.run_storage import on_threads
from service.api.dependencies import Components
from service.api.schemas import EventView
from service.domain.access import Caller
from service.domain.jobs import Job
from service.store.jobs import JobSnapshot

MEDIA_TYPE = "text/event-stream"
SECONDS_BETWEEN_LOOKS = 0.5
"""At a log's file; at a job the components look for all streams together."""
SECONDS_BETWEEN_SIGNS = 15.0
"""Of life, for whatever lies in between and ends connections that are silent."""
SECONDS_BETWEEN_STATES = 1.0
"""Of a progress bar."""
LINES_AT_ONCE = 200
READERS = ThreadPoolExecutor(32, thread_name_prefix="log")
"""Threads that read logs: others' are left to others, should the storage hang."""
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

    def __init__(self, components: Components, caller: Caller, events: AsyncIterator[bytes]) -> None:
        if not components.watch.open_stream(caller.token_id):
            detail = (
                "this token follows as many logs and timelines as it may; end one of them, or list without `follow`"
            )
            raise HTTPException(429, detail, headers={"Retry-After": "5"})
        self._watch, self._token_id = components.watch, caller.token_id
        super().__init__(events, media_type=MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the end of the stream or the connection."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._watch.close_stream(self._token_id)


SIGN_OF_LIFE = format_sse_event(comment="still here")


async def read_log(components: Components, job: Job, place: LogOffset, wanted: Selection) -> AsyncIterator[list[Line]]:
    """Yield the current lines of an attempt's log in batches."""
    log = AttemptLog(components.files.attempt_folder(job, place.attempt), place)
    async for lines in _in_parts(log.read(is_over=True)):
        yield [line for line in lines if wanted.takes(line)]


async def follow_log(
    components: Components, caller: Caller, job: Job, place: LogOffset, wanted: Selection
) -> AsyncIterator[bytes]:
    """Stream the log of a job from an offset until the job or the token ends."""
    with components.watch.watching(job.id):
        pulse = JobSnapshot(job.version, job.state, job.attempt, job.progress)
        log = AttemptLog(components.files.attempt_folder(job, place.attempt), place)
        spoke_at = looked_at = time.monotonic()
        unfinished: list[Line] = []
        while not components.watch.is_over(caller.token_id):
            # What is over before the file is read grows no more after it.
            is_over = pulse.state.is_terminal or log.place.attempt < pulse.attempt
            async for lines in _in_parts(log.read(is_over=is_over)):
                if components.watch.is_over(caller.token_id):
                    return
                for line in filter(wanted.takes, lines):
                    yield event(_content(line), kind="line", place=line.place)
                    spoke_at = time.monotonic()
            if is_over and log.place.attempt < pulse.attempt:
                start = LogOffset(log.place.attempt + 1)
                log = AttemptLog(components.files.attempt_folder(job, start.attempt), start)
                continue
            if is_over:
                yield event({"state": pulse.state}, kind="end", place=log.place)
                return
            if time.monotonic() - looked_at > SECONDS_BETWEEN_STATES:
                before, looked_at = unfinished, time.monotonic()
                unfinished = await on_threads(READERS, log.unfinished)
                for line in unfinished:
                    if wanted.takes(line) and line not in before:
                        yield event(_content(line), kind="unfinished")
                        spoke_at = looked_at
            if time.monotonic() - spoke_at > SECONDS_BETWEEN_SIGNS:
                yield SIGN_OF_LIFE
                spoke_at = time.monotonic()
            pulse = await components.watch.next(job.id, pulse, caller.token_id, SECONDS_BETWEEN_LOOKS) or pulse


async def follow_events(components: Components, caller: Caller, job: Job, after: int) -> AsyncIterator[bytes]:
    """Stream state changes after number `after`, and progress, until the job or token ends."""
    with components.watch.watching(job.id):
        pulse: JobSnapshot | None = None
        while not components.watch.is_over(caller.token_id):
            seen = await components.jobs.events_of(job.id, after)
            for found in seen:
                after = found.sequence
                yield event(EventView.of(found), kind="transition", place=after)
            if pulse is not None and pulse.progress is not None:
                yield event(pulse.progress, kind="progress")
            if (pulse.state if pulse else job.state).is_terminal:
                # The end and its event are one transaction, so the event has been read by now.
                yield event({"state": pulse.state if pulse else job.state}, kind="end", place=after)
                return
            news = await components.watch.next(job.id, pulse, caller.token_id, SECONDS_BETWEEN_SIGNS)
            if news == pulse:
                yield SIGN_OF_LIFE
            pulse = news


def _content(line: Line) -> dict[str, Any]:
    return {"rank": line.rank, "level": line.level, "text": line.text}


async def _in_parts(lines: Iterator[Line]) -> AsyncIterator[list[Line]]:
    """Read a batch of lines in a thread. Raises UpstreamUnavailable after a timeout."""
    while part := await on_threads(READERS, lambda: list(islice(lines, LINES_AT_ONCE))):
        yield part
