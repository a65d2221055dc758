"""Routes for jobs."""

import base64
import binascii
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse, PlainTextResponse

from service.api.components import GivenComponents
from service.api.schemas import EventList, EventView, JobList, JobView, SubmitJob
from service.domain.errors import InvalidField
from service.domain.jobs import Job, new_id

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", status_code=202)
async def submit_job(body: SubmitJob, components: GivenComponents, response: Response) -> JobView:
    """Store a job and answer with its address; the dispatcher takes it from there."""
    job = Job(
        id=new_id("job"), name=body.name, spec=body.spec, reason="submitted by the user", created_at=datetime.now(UTC)
    )
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
async def show_job(job_id: str, components: GivenComponents) -> JobView:
    """Show one job."""
    return JobView.of(await components.jobs.get(job_id), components.mlflow_public_url)


@router.post("/{job_id}:cancel", status_code=202)
async def cancel_job(job_id: str, components: GivenComponents) -> JobView:
    """Ask for a job to be cancelled; its state follows. A job that has ended in another way answers 409."""
    job = await components.jobs.request_cancel(job_id)
    components.dispatcher.wake()
    return JobView.of(job, components.mlflow_public_url)


@router.get("/{job_id}/events")
async def list_events(job_id: str, components: GivenComponents) -> EventList:
    """List a job's transitions in order."""
    await components.jobs.get(job_id)
    return EventList(events=[EventView.of(event) for event in await components.jobs.events_of(job_id)])


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
async def read_logs(
    job_id: str,
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
        return FileResponse(path, media_type="text/plain; charset=utf-8")
    # Without a log of its own the driver did not come far: what there is, Ray has.
    return PlainTextResponse(await components.ray.logs(f"{job.id}-a{attempt}"))


def _token(place: int) -> str:
    return base64.urlsafe_b64encode(str(place).encode()).decode().rstrip("=")


def _place(token: str) -> int:
    try:
        return int(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (binascii.Error, ValueError):
        raise InvalidField("page_token", token, "takes the next_page_token of an earlier answer") from None
