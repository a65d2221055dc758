"""Page of a comparison, and its report as a file."""

import asyncio
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from service.api.dependencies import ComparisonId, Comparisons, Jobs, PublicUrl, Reports
from service.api.json_body import in_thread
from service.api.report_files import MEDIA_TYPES, Format, report_file
from service.api.schemas import JobSummaryView
from service.api.web.jobs import MLFLOW
from service.api.web.pages import HEADERS, PageRoute, Reader, page
from service.domain.comparisons import Comparison
from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.mlflow_views import comparison_url
from service.domain.reports import ComparisonReport
from service.engine.comparison_reports import ComparisonReports
from service.rendering.content import X_LABELS, ReportContent, XAxis, metric_bands
from service.rendering.series import thin

MAX_SMOOTHING = 0.99
MAX_JOBS, MAX_CELLS = 20, 400
"""Jobs and cells of numbers on the page, which is fetched again every few seconds."""
REPORT_SECONDS = 10.0
"""Time for MLflow's answers about all runs; the page is shown without a report after it."""

router = APIRouter(prefix="/comparisons", include_in_schema=False, route_class=PageRoute)


class ChartQuery(BaseModel):
    """Axes and smoothing of the curves."""

    x: XAxis = "step"
    smoothing: float = Field(0, ge=0, le=MAX_SMOOTHING)
    log: Literal["", "x", "y", "xy"] = ""

    @property
    def text(self) -> str:
        """The query as text."""
        return urlencode(self.model_dump(mode="json"))


@router.get("/{comparison_id:identifier}")
async def show_comparison(
    request: Request,
    comparison_id: ComparisonId,
    caller: Reader,
    comparison_store: Comparisons,
    job_store: Jobs,
    reports: Reports,
    query: Annotated[ChartQuery, Query()],
) -> Response:
    """Show the report of a comparison, or its jobs alone without MLflow."""
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    address = f"/comparisons/{comparison_id}"
    content = await _content(reports, comparison, address)
    jobs = [JobSummaryView.of(job, MLFLOW) for job in await job_store.list_by_comparison(comparison_id)]
    bands = await in_thread(metric_bands, content.report, query.x, query.smoothing) if content else []
    return await in_thread(
        page,
        request,
        "comparison.html",
        caller,
        comparison=comparison,
        mlflow_url=comparison_url(MLFLOW, comparison),
        content=content,
        bands=bands,
        max_cells=MAX_CELLS,
        max_jobs=MAX_JOBS,
        jobs=jobs,
        is_open=any(not job.state.is_terminal for job in jobs),
        states={state: sum(job.state == state for job in jobs) for state in JobState},
        query=query,
        address=address,
        formats=list(MEDIA_TYPES),
    )


@router.get("/{comparison_id:identifier}/curves.json")
async def show_curves(
    comparison_id: ComparisonId,
    caller: Reader,
    comparison_store: Comparisons,
    reports: Reports,
    query: Annotated[ChartQuery, Query()],
) -> Response:
    """Return the drawn curves, for the chart that can be zoomed."""
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    report = await reports.report(comparison)
    return await in_thread(lambda: JSONResponse(_aligned(report, query), headers=HEADERS))


async def _content(reports: ComparisonReports, comparison: Comparison, address: str) -> ReportContent | None:
    """Return the content of the report, or None if MLflow does not answer in time."""
    try:
        async with asyncio.timeout(REPORT_SECONDS):
            return await reports.content(comparison, address, comparison_url(MLFLOW, comparison))
    except (TimeoutError, UpstreamUnavailable, UpstreamRejected):
        return None


def _aligned(report: ComparisonReport, query: ChartQuery) -> dict[str, Any]:
    """Return the bands over one common axis; null where a band has no point."""
    bands = metric_bands(report, query.x, query.smoothing)
    lines = {
        name: [dict(thin(list(zip(band.x, getattr(band, name), strict=True)))) for band in bands]
        for name in ("mean", "low", "high")
    }
    x = sorted({place for line in lines.values() for points in line for place in points})
    if "x" in query.log:
        x = [place for place in x if place > 0]
    return {
        "title": f"{report.comparison.metric} against {X_LABELS[query.x]}",
        "metric": report.comparison.metric,
        "x_label": X_LABELS[query.x],
        "log": query.log,
        "target": report.setting.target,
        "x": x,
        "bands": [
            {"label": band.label}
            | {name: [points[number].get(place) for place in x] for name, points in lines.items()}
            for number, band in enumerate(bands)
        ],
    }


@router.get("/{comparison_id:identifier}/report.{suffix}")
async def download_report(
    comparison_id: ComparisonId,
    suffix: Format,
    caller: Reader,
    comparison_store: Comparisons,
    reports: Reports,
    public_url: PublicUrl,
) -> Response:
    """Return the report as a file."""
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    mlflow_url = comparison_url(f"{public_url}/mlflow", comparison)
    content = await reports.content(comparison, f"{public_url}/comparisons/{comparison_id}", mlflow_url)
    return await in_thread(report_file, content, suffix)
