"""Overview and list of jobs."""

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, model_validator

from service.api.dependencies import COMPARISON, Comparisons, Jobs
from service.api.json_body import in_thread
from service.api.pagination import decode_page_token, encode_page_token
from service.api.schemas import ComparisonSummaryView, JobSummaryView
from service.api.web.pages import PageRoute, Reader, page
from service.domain.access import Caller, Owner
from service.domain.jobs import JobState
from service.domain.submission import Tag
from service.store.jobs import Filter, JobStore
from trainer.jobspec import Norm

MLFLOW = "/mlflow"
"""Address of MLflow's pages for links on pages, which lead to the host that the browser knows."""
RECENT = 10
PAGE_SIZE = 50

router = APIRouter(include_in_schema=False, route_class=PageRoute)


class JobQuery(BaseModel):
    """Filters and place of a list; a form sends those that are not set as empty."""

    state: JobState | None = None
    owner: Owner | None = None
    norm: Norm | None = None
    tag: Tag | None = None
    comparison: Annotated[str | None, Field(pattern=COMPARISON)] = None
    page_token: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value != ""}

    def url(self, page_token: str | None = None) -> str:
        """Return the address of a page of the list with these filters."""
        values = self.model_dump(mode="json", exclude_none=True, exclude={"page_token"})
        query = urlencode(values | ({"page_token": page_token} if page_token else {}))
        return f"/jobs?{query}" if query else "/jobs"

    @property
    def first(self) -> str:
        """Address of the first page."""
        return self.url()


@router.get("/")
async def show_overview(
    request: Request, caller: Reader, comparison_store: Comparisons, job_store: Jobs
) -> Response:
    """Show the newest comparisons and jobs."""
    comparisons, _ = await comparison_store.page(RECENT, None, caller.sees_only)
    jobs, _ = await _page(job_store, caller, JobQuery(), RECENT)
    shown = [ComparisonSummaryView.of(each.comparison, each.jobs, MLFLOW) for each in comparisons]
    is_open = any(not job.state.is_terminal for job in jobs) or any(each.is_open for each in shown)
    return page(request, "overview.html", caller, comparisons=shown, jobs=jobs, is_open=is_open)


@router.get("/jobs")
async def show_jobs(
    request: Request, caller: Reader, job_store: Jobs, query: Annotated[JobQuery, Query()]
) -> Response:
    """Show a page of the jobs that match all filters, newest first."""
    jobs, more = await _page(job_store, caller, query, PAGE_SIZE)
    is_open = any(not job.state.is_terminal for job in jobs)
    return page(
        request,
        "jobs.html",
        caller,
        jobs=jobs,
        query=query,
        more=query.url(more) if more else None,
        here=query.url(query.page_token),
        is_open=is_open,
        states=[state.value for state in JobState],
        norms=[norm.value for norm in Norm],
    )


async def _page(
    jobs: JobStore, caller: Caller, query: JobQuery, size: int
) -> tuple[list[JobSummaryView], str | None]:
    # Jobs of others do not exist for the caller, so the list is empty instead of an error.
    if caller.sees_only not in (None, query.owner or caller.sees_only):
        return [], None
    wanted = Filter(
        owner=caller.sees_only or query.owner,
        state=query.state,
        comparison_id=query.comparison,
        norm=query.norm,
        tag=query.tag,
    )
    found, more = await jobs.page(size, decode_page_token(query.page_token), wanted)
    return await in_thread(lambda: [JobSummaryView.of(job, MLFLOW) for job in found]), encode_page_token(more)
