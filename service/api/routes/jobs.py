"""Routes for jobs."""

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Annotated
from zlib import crc32

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import PlainTextResponse, StreamingResponse

from service.adapters.job_log import PLACE, Level, Line, LogOffset, Selection
from service.adapters.run_storage import on_storage
from service.api.auth import Reader, Submitter
from service.api.dependencies import (
    COMPARISON,
    Checks,
    Feed,
    Files,
    JobId,
    Jobs,
    MlflowUrl,
    Ray,
    WakeDispatcher,
)
from service.api.idempotency import Route
from service.api.json_body import respond
from service.api.pagination import MAX_SEQUENCE, PageSize, PageToken, decode_page_token, encode_page_token
from service.api.routes.streams import Stream, described, follow_events, follow_log, read_log
from service.api.schemas import ChangeJob, EventList, EventView, JobList, JobSummaryView, JobView, SubmitJob
from service.domain.access import Caller, Owner
from service.domain.comparisons import check_size
from service.domain.errors import Conflict, VersionMismatch
from service.domain.jobs import Job, JobState
from service.domain.submission import Tag, clone, options_of, resume
from service.store.jobs import Filter
from trainer.jobspec import InvalidField, Norm

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=Route)


@dataclass(frozen=True)
class _Add:
    """Stores a new job and answers with it."""

    job_store: Jobs
    mlflow_url: MlflowUrl
    wake: WakeDispatcher
    response: Response

    async def __call__(self, job: Job) -> JobView:
        await self.job_store.add(job)
        self.wake()
        self.response.headers["Location"] = f"/v1/jobs/{job.id}"
        self.response.headers["ETag"] = etag(job)
        return JobView.of(job, self.mlflow_url)


@dataclass(frozen=True)
class _Derive:
    """Makes a job from another one, with the owner and permissions of the caller."""

    job_store: Jobs
    checks: Checks

    async def __call__(self, make: Callable[..., Job], job_id: str, body: ChangeJob, caller: Caller) -> Job:
        old = await self.job_store.get(job_id, caller.sees_only)
        job = make(old, owner=caller.owner, name=body.name, overrides=body.overrides, secrets={})
        # Secrets and priority are those of the caller, who may be another owner than that of the old job.
        most = self.checks.policy.quota_of(caller.owner).priority
        priority = job.priority if most is None else min(job.priority, most)
        options = options_of(replace(old, priority=priority))
        secrets = await self.checks.check(caller.owner, [job.spec], options)
        return replace(job, priority=priority, secrets=secrets)


@dataclass(frozen=True)
class _Unpause:
    """Returns a paused job to the queue; None if it is not paused."""

    job_store: Jobs
    mlflow_url: MlflowUrl
    wake: WakeDispatcher

    async def __call__(self, job_id: str, body: ChangeJob, caller: Caller) -> JobView | None:
        job = await self.job_store.get(job_id, caller.sees_only)
        if not job.pause_requested:
            return None
        if body.name is not None or body.overrides:
            raise Conflict(f"job {job_id} is paused and continues as it is, without overrides")
        job = await self.job_store.request_unpause(job_id, caller.owner)
        self.wake()
        return JobView.of(job, self.mlflow_url)


Unpause = Annotated[_Unpause, Depends()]
IfMatch = Annotated[
    str | None, Header(alias="If-Match", max_length=200, description="the `ETag` that the job must have")
]
Add = Annotated[_Add, Depends()]
Derive = Annotated[_Derive, Depends()]


@router.post("", status_code=202)
async def submit_job(body: SubmitJob, caller: Submitter, checks: Checks, add: Add) -> JobView:
    """Submit a job."""
    check_size(body.spec)
    # Before the first write: checks call other systems, which must not happen inside a transaction.
    secrets = await checks.check(caller.owner, [body.spec], body)
    return await add(body.job(owner=caller.owner, name=body.name, spec=body.spec, secrets=secrets))


@router.get("", response_model=JobList)
async def list_jobs(
    caller: Reader,
    job_store: Jobs,
    mlflow_url: MlflowUrl,
    owner: Annotated[Owner | None, Query()] = None,
    state: Annotated[JobState | None, Query()] = None,
    comparison: Annotated[str | None, Query(pattern=COMPARISON, description="a comparison's id")] = None,
    norm: Annotated[Norm | None, Query()] = None,
    tag: Annotated[Tag | None, Query()] = None,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> JobList | Response:
    """List the jobs of the caller that match all filters, newest first.

    With the scope admin, lists the jobs of all callers.
    """
    # Jobs of others do not exist for the caller, so the list is empty instead of an error.
    if caller.sees_only not in (None, owner or caller.sees_only):
        return JobList(jobs=[], next_page_token=None)
    wanted = Filter(
        owner=caller.sees_only or owner, state=state, comparison_id=comparison, norm=norm, tag=tag
    )
    jobs, more = await job_store.page(page_size, decode_page_token(page_token), wanted)
    return await respond(
        lambda: JobList(
            jobs=[JobSummaryView.of(job, mlflow_url) for job in jobs],
            next_page_token=encode_page_token(more),
        )
    )


@router.get(
    "/{job_id:identifier}",
    response_model=JobView,
    responses={304: {"description": "it is as `If-None-Match` says"}},
)
async def show_job(
    job_id: JobId,
    caller: Reader,
    job_store: Jobs,
    mlflow_url: MlflowUrl,
    response: Response,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match", max_length=200)] = None,
) -> JobView | Response:
    """Show a job, with an `ETag` that changes with it."""
    job = await job_store.get(job_id, caller.sees_only)
    if if_none_match == etag(job):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": etag(job)})
    response.headers["ETag"] = etag(job)
    return JobView.of(job, mlflow_url)


@router.post("/{job_id:identifier}:cancel", status_code=202)
async def cancel_job(
    job_id: JobId,
    caller: Submitter,
    job_store: Jobs,
    mlflow_url: MlflowUrl,
    wake: WakeDispatcher,
    if_match: IfMatch = None,
) -> JobView:
    """Request the cancellation of a job. A job that has ended otherwise answers 409."""
    job = await job_store.get(job_id, caller.sees_only)
    version = _version(job, if_match) if if_match else None
    job = await job_store.request_cancel(job_id, caller.owner, version)
    wake()
    return JobView.of(job, mlflow_url)


@router.post("/{job_id:identifier}:pause", status_code=202)
async def pause_job(
    job_id: JobId,
    caller: Submitter,
    job_store: Jobs,
    mlflow_url: MlflowUrl,
    wake: WakeDispatcher,
    if_match: IfMatch = None,
) -> JobView:
    """Request a pause of a job, until it is resumed.

    A running one saves a checkpoint, stops and frees its resources. A job that has ended, or is being
    cancelled, answers 409.
    """
    job = await job_store.get(job_id, caller.sees_only)
    version = _version(job, if_match) if if_match else None
    job = await job_store.request_pause(job_id, caller.owner, version)
    wake()
    return JobView.of(job, mlflow_url)


@router.post("/{job_id:identifier}:resume", status_code=202)
async def resume_job(
    job_id: JobId, body: ChangeJob, caller: Submitter, unpause: Unpause, derive: Derive, add: Add
) -> JobView:
    """Continue a paused job, or an ended one as a new job.

    The new job has the checkpoints of the ended one. A paused job has no overrides.
    """
    if (job := await unpause(job_id, body, caller)) is not None:
        return job
    return await add(await derive(resume, job_id, body, caller))


@router.post("/{job_id:identifier}:clone", status_code=202)
async def clone_job(job_id: JobId, body: ChangeJob, caller: Submitter, derive: Derive, add: Add) -> JobView:
    """Submit a new job with the spec of another one, from step 0."""
    return await add(await derive(clone, job_id, body, caller))


@router.get(
    "/{job_id:identifier}/events", response_model=EventList, responses=described("transition", "progress")
)
async def list_events(
    job_id: JobId,
    caller: Reader,
    job_store: Jobs,
    feed: Feed,
    follow: Annotated[
        bool,
        Query(description="stream transitions and progress as server-sent events until the job has ended"),
    ] = False,
    last_event_id: Annotated[
        str | None,
        Header(alias="Last-Event-ID", pattern=r"^[0-9]{1,10}$", description="go on after this event"),
    ] = None,
) -> EventList | Response:
    """List the state changes of a job in order."""
    job = await job_store.get(job_id, caller.sees_only)
    after = _sequence(last_event_id) if last_event_id else 0
    if follow:
        return Stream(feed, caller, follow_events(feed, job_store, caller, job, after))
    return EventList(
        events=[EventView.model_validate(event) for event in await job_store.events_of(job_id, after)]
    )


@router.get(
    "/{job_id:identifier}/logs", response_class=PlainTextResponse, responses=described("line", "unfinished")
)
async def read_logs(
    job_id: JobId,
    caller: Reader,
    job_store: Jobs,
    feed: Feed,
    files: Files,
    ray: Ray,
    attempt: Annotated[
        int | None,
        Query(ge=1, description="default: the last one; of a stream, where it begins, by default the first"),
    ] = None,
    rank: Annotated[int | None, Query(ge=0, description="lines of this worker alone")] = None,
    level: Annotated[Level | None, Query(description="lines of this level or a more serious one")] = None,
    follow: Annotated[
        bool, Query(description="stream lines as server-sent events until the job has ended")
    ] = False,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", pattern=PLACE.pattern, description="go on after this event")
    ] = None,
) -> Response:
    """Return or follow the log of a job; empty before it has started."""
    job = await job_store.get(job_id, caller.sees_only)
    wanted = Selection(rank, level)
    if attempt is not None and attempt > job.attempt:
        raise InvalidField("attempt", attempt, f"must be 1 to {job.attempt}")
    if follow:
        place = LogOffset.parse("Last-Event-ID", last_event_id) if last_event_id else LogOffset(attempt or 1)
        if place.attempt > job.attempt:
            raise InvalidField("Last-Event-ID", last_event_id, "must be the id of an event of this stream")
        return Stream(feed, caller, follow_log(feed, files, caller, job, place, wanted))
    place = LogOffset(attempt or job.attempt)
    if await on_storage(files.log_path(job, place.attempt).is_file):
        lines = read_log(files, job, place, wanted)
        return StreamingResponse(log_text(lines), media_type="text/plain; charset=utf-8")
    # Without a log of its own the driver did not come far: what there is, Ray has.
    return PlainTextResponse(await ray.logs(f"{job.id}-a{place.attempt}"))


async def log_text(parts: AsyncIterator[list[Line]]) -> AsyncIterator[str]:
    """Yield lines as text, with the ranks of their workers."""
    async for lines in parts:
        yield "".join(
            f"{line.text}\n" if line.rank is None else f"[{line.rank}] {line.text}\n" for line in lines
        )


def _sequence(last_event_id: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", last_event_id) or int(last_event_id) > MAX_SEQUENCE:
        raise InvalidField("Last-Event-ID", last_event_id, "must be the id of an event of this stream")
    return int(last_event_id)


def etag(job: Job) -> str:
    """Return the ETag of a job, from its version and its reason for waiting."""
    # Queue reasons change without a new version, since they are rewritten in bulk.
    return f'"{job.version}-{crc32(job.reason.encode()):x}"'


def _version(job: Job, if_match: str) -> int:
    if if_match not in (etag(job), "*"):
        raise VersionMismatch(f"job {job.id} has changed since: it is {job.state.value}, {job.reason}")
    return job.version
