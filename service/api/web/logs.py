"""Page of a job's log: its newest lines, followed while the job runs."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, model_validator

from service.adapters.job_log import LEVELS, PLACE, AttemptLog, Level, Line, LogOffset, Selection
from service.adapters.ray import RayJobs
from service.adapters.run_storage import RunFiles, on_storage, on_threads
from service.api.dependencies import Files, JobId, Jobs, Ray
from service.api.routes.jobs import log_text
from service.api.routes.streams import READERS, read_log
from service.api.web.pages import PageRoute, Reader, page
from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import Job, submission_id
from trainer.jobspec import InvalidField

MAX_LINES = 1_000
MAX_LINE_CHARS = 2_000
MAX_SHOWN_CHARS = 60_000
"""Maximum size of the lines of one page."""
TAIL_BYTES, SEARCHED_BYTES = 200_000, 16_000_000
"""End of the log that is read for its first lines, and at most with filters or after a place."""

router = APIRouter(prefix="/jobs", include_in_schema=False, route_class=PageRoute)


class LogQuery(BaseModel):
    """Filters of a log; a form sends those that are not set as empty."""

    attempt: Annotated[int | None, Field(ge=1)] = None
    rank: Annotated[int | None, Field(ge=0)] = None
    level: Level | None = None
    search: Annotated[str, Field(max_length=200)] = ""
    after: Annotated[str | None, Field(pattern=PLACE.pattern)] = None
    """Place after which lines are new; None for the first lines of a page."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value != ""}

    @property
    def is_filtered(self) -> bool:
        """Whether lines are left out."""
        return bool(self.search) or self.rank is not None or self.level is not None

    def matches(self, line: Line) -> bool:
        """Return whether a line matches all filters; the search ignores case."""
        is_found = not self.search or self.search.casefold() in line.text.casefold()
        return is_found and Selection(self.rank, self.level).matches(line)

    def url(self, path: str, **changes: str) -> str:
        """Return an address with these filters."""
        values = self.model_dump(exclude_none=True, exclude={"after"}, exclude_defaults=True) | changes
        return f"{path}?{urlencode(values)}" if values else path


@dataclass(frozen=True)
class LogPart:
    """Lines of a log up to a place."""

    lines: list[Line]
    unfinished: list[Line]
    """Lines that are still being overwritten, as by progress bars."""
    place: LogOffset
    has_more_before: bool
    is_over: bool


@router.get("/{job_id:identifier}/logs")
async def show_log(
    request: Request,
    job_id: JobId,
    caller: Reader,
    job_store: Jobs,
    files: Files,
    ray: Ray,
    query: Annotated[LogQuery, Query()],
) -> Response:
    """Show the end of a log, or with `after` only what follows."""
    job = await job_store.get(job_id, caller.sees_only)
    attempt = _attempt(job, query)
    is_over = job.state.is_terminal or attempt < job.attempt
    folder = files.attempt_folder(job, attempt)
    place = LogOffset.parse("after", query.after) if query.after else None
    part = await on_threads(READERS, lambda: read_part(folder, attempt, place, query, is_over=is_over))
    path = f"/jobs/{job.id}/logs"
    return page(
        request,
        "log_lines.html" if place else "logs.html",
        caller,
        job=job,
        part=part,
        query=query,
        levels=LEVELS,
        attempt=attempt,
        max_chars=MAX_LINE_CHARS,
        from_ray=None if part.lines or place else await _log_of_ray(job, attempt, files, ray),
        here=query.url(path),
        next=query.url(path, attempt=str(attempt), after=str(part.place)),
    )


@router.get("/{job_id:identifier}/logs.txt")
async def download_log(
    job_id: JobId, caller: Reader, job_store: Jobs, files: Files, query: Annotated[LogQuery, Query()]
) -> Response:
    """Return the whole log of an attempt as text."""
    job = await job_store.get(job_id, caller.sees_only)
    place = LogOffset(_attempt(job, query))
    lines = read_log(files, job, place, Selection(query.rank, query.level))
    return StreamingResponse(log_text(lines), media_type="text/plain; charset=utf-8")


def read_part(
    folder: Path, attempt: int, place: LogOffset | None, query: LogQuery, *, is_over: bool
) -> LogPart:
    """Read the lines after a place, or without one those at the end of the log."""
    tail = _tail(folder, attempt, SEARCHED_BYTES if query.is_filtered or place else TAIL_BYTES)
    is_cut = tail.offset > (place.offset if place else 0)
    log = AttemptLog(folder, tail if is_cut or place is None else place)
    lines: deque[Line] = deque(maxlen=MAX_LINES)
    found = _whole(log.read(is_over=is_over), is_cut=is_cut)
    count = 0
    for count, line in enumerate(filter(query.matches, found), start=1):  # noqa: B007 - the number of lines
        lines.append(line)
    shown = _fitting(lines)
    unfinished = [] if is_over else [line for line in log.unfinished() if query.matches(line)]
    return LogPart(shown, unfinished, log.place, is_cut or len(shown) < count, is_over)


def _tail(folder: Path, attempt: int, size: int) -> LogOffset:
    """Return the place `size` bytes before the end of a log."""
    total = sum(path.stat().st_size for path in folder.glob("log*.txt"))
    return LogOffset(attempt, max(0, total - size))


def _whole(lines: Iterator[Line], *, is_cut: bool) -> Iterator[Line]:
    """Skip the rest of a line in whose middle reading began."""
    if is_cut:
        next(lines, None)
    yield from lines


def _fitting(lines: deque[Line]) -> list[Line]:
    """Return the last lines that fit a page."""
    kept: deque[Line] = deque()
    room = MAX_SHOWN_CHARS
    while lines and (room := room - min(len(lines[-1].text), MAX_LINE_CHARS) - 60) >= 0:
        kept.appendleft(lines.pop())
    return list(kept)


def _attempt(job: Job, query: LogQuery) -> int:
    if query.attempt is not None and query.attempt > job.attempt:
        raise InvalidField("attempt", query.attempt, f"must be 1 to {job.attempt}")
    return query.attempt or job.attempt


async def _log_of_ray(job: Job, attempt: int, files: RunFiles, ray: RayJobs) -> str | None:
    """Return Ray's log of an attempt whose driver has not written one."""
    if await on_storage(files.log_path(job, attempt).is_file):
        return None
    try:
        text = await ray.logs(submission_id(job.id, attempt))
    except (UpstreamUnavailable, UpstreamRejected):
        return None
    return text[-MAX_SHOWN_CHARS:] or None
