"""Routes for jobs."""

import base64
import binascii
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Response
from fastapi import Path as PathParameter
from fastapi.responses import PlainTextResponse, StreamingResponse

from service.api.components import GivenComponents
from service.api.schemas import EventList, EventView, JobList, JobView, SubmitJob
from service.domain.errors import InvalidField
from service.domain.jobs import ADMIN

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
CHUNK_BYTES = 65_536
LARGEST_PLACE = 2**31 - 1
JobId = Annotated[str, PathParameter(pattern=r"^job-[0-9a-f]{1,12}$", description="such as `job-3f9c2b7a10de`")]


@router.post("", status_code=202)
async def submit_job(body: SubmitJob, components: GivenComponents, response: Response) -> JobView:
    """Store a job and answer with its address; the dispatcher takes it from there."""
    components.permissions.check(body.spec)
    job = body.job(owner=ADMIN, name=body.name, spec=body.spec)
    await components.jobs.add(job)
    components.dispatcher.wake()
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobView.of(job, components.mlflow_public_url)


@router.get("")
async def list_jobs(
    components: GivenComponents,
    page_size: Annotated[int, Query(ge=1, le=1_000)] = 50,
    page_token: Annotated[str | None, Query(description="`next_page_token` of the page before")] = None,
) -> JobList:
    """List jobs, newest first."""
    jobs, more = await components.jobs.page(page_size, _place(page_token) if page_token else None)
    return JobList(
        jobs=[JobView.of(job, components.mlflow_public_url) for job in jobs],
        next_page_token=_token(more) if more is not None else None,
    )


@router.get("/{job_id}")
async def show_job(job_id: JobId, components: GivenComponents) -> JobView:
    """Show one job."""
    return JobView.of(await components.jobs.get(job_id), components.mlflow_public_url)


@router.post("/{job_id}:cancel", status_code=202)
async def cancel_job(job_id: JobId, components: GivenComponents) -> JobView:
    """Ask for a job to be cancelled; its state follows. A job that has ended in another way answers 409."""
    job = await components.jobs.request_cancel(job_id, ADMIN)
    components.dispatcher.wake()
    return JobView.of(job, components.mlflow_public_url)


@router.get("/{job_id}/events")
async def list_events(job_id: JobId, components: GivenComponents) -> EventList:
    """List a job's transitions in order."""
    await components.jobs.get(job_id)
    return EventList(events=[EventView.of(event) for event in await components.jobs.events_of(job_id)])


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
async def read_logs(
    job_id: JobId,
    components: GivenComponents,
    attempt: Annotated[int | None, Query(ge=1, description="default: the last one")] = None,
) -> Response:
    """Read what an attempt's driver and workers printed; empty before it has started."""
    job = await components.jobs.get(job_id)
    attempt = attempt or job.attempt
    if attempt > job.attempt:
        raise InvalidField("attempt", attempt, f"takes 1 to {job.attempt}")
    path = components.files.log(job, attempt)
    if path is not None:
        return StreamingResponse(_read(path), media_type="text/plain; charset=utf-8")
    # Without a log of its own the driver did not come far: what there is, Ray has.
    return PlainTextResponse(await components.ray.logs(f"{job.id}-a{attempt}"))


async def _read(path: Path) -> AsyncIterator[bytes]:
    """Read what a file holds now; it may be growing, so neither its length nor its end is announced beforehand."""
    left = (await anyio.Path(path).stat()).st_size
    async with await anyio.open_file(path, "rb") as file:
        while left > 0 and (chunk := await file.read(min(left, CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk


def _token(place: int) -> str:
    return base64.urlsafe_b64encode(str(place).encode()).decode().rstrip("=")


def _place(token: str) -> int:
    try:
        text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    except (binascii.Error, ValueError):
        text = ""
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > LARGEST_PLACE:
        raise InvalidField("page_token", token, "takes the next_page_token of an earlier answer")
    return int(text)
