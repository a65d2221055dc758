"""Routes for comparisons."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.api.auth import Reader, Submitter
from service.api.dependencies import (
    Checks,
    ComparisonId,
    Comparisons,
    Jobs,
    MlflowUrl,
    PublicUrl,
    Reports,
    WakeDispatcher,
)
from service.api.idempotency import Route
from service.api.json_body import in_thread, respond
from service.api.pagination import PageSize, PageToken, decode_page_token, encode_page_token
from service.api.report_files import TEXTS, Format, report_file
from service.api.schemas import (
    ComparisonList,
    ComparisonSummaryView,
    ComparisonView,
    Curves,
    Report,
    RunCurve,
    SubmitComparison,
    VerdictView,
)
from service.domain.access import Owner
from service.domain.comparisons import Comparison, choose_baseline, describe, expand, warnings_of
from service.domain.errors import Conflict
from service.domain.jobs import MAX_NAME_CHARS, new_id
from service.domain.mlflow_views import comparison_url
from service.domain.recipes import Claim

router = APIRouter(prefix="/v1/comparisons", tags=["comparisons"], route_class=Route)


@router.post("", status_code=202)
async def submit_comparison(
    body: SubmitComparison,
    caller: Submitter,
    checks: Checks,
    comparison_store: Comparisons,
    mlflow_url: MlflowUrl,
    wake: WakeDispatcher,
    response: Response,
) -> ComparisonView:
    """Submit a comparison: one job per point of its matrix, in one transaction."""
    # In a thread: a comparison may expand to many specs, each of which is validated.
    points = await in_thread(expand, body.spec, body.matrix, body.variants)
    secrets = await checks.check(caller.owner, [spec for _, spec in points], body)
    comparison = Comparison(
        id=new_id("comparison"),
        owner=caller.owner,
        name=body.name,
        matrix=body.axes,
        baseline=choose_baseline(body.axes, body.baseline),
        metric=body.metric,
        target=body.target,
        recipe=body.recipe.model_dump(mode="json", exclude_unset=True) if body.recipe else None,
        created_at=datetime.now(UTC),
    )
    jobs = [
        body.job(
            owner=caller.owner,
            name=describe(variant)[:MAX_NAME_CHARS],
            spec=spec,
            secrets=secrets,
            comparison_id=comparison.id,
            variant=variant,
        )
        for variant, spec in points
    ]
    await comparison_store.add(comparison, jobs)
    wake()
    response.headers["Location"] = f"/v1/comparisons/{comparison.id}"
    return ComparisonView.of(comparison, jobs, mlflow_url, warnings_of([spec for _, spec in points]))


@router.get("", response_model=ComparisonList)
async def list_comparisons(
    caller: Reader,
    comparison_store: Comparisons,
    mlflow_url: MlflowUrl,
    owner: Annotated[Owner | None, Query()] = None,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> ComparisonList | Response:
    """List the comparisons of the caller, newest first.

    With the scope admin, lists the comparisons of all callers.
    """
    # Comparisons of others do not exist for the caller, so the list is empty instead of an error.
    if caller.sees_only not in (None, owner or caller.sees_only):
        return ComparisonList(comparisons=[], next_page_token=None)
    found, more = await comparison_store.page(
        page_size, decode_page_token(page_token), caller.sees_only or owner
    )

    def make() -> ComparisonList:
        views = [ComparisonSummaryView.of(each.comparison, each.jobs, mlflow_url) for each in found]
        return ComparisonList(comparisons=views, next_page_token=encode_page_token(more))

    return await respond(make)


@router.get("/{comparison_id:identifier}", response_model=ComparisonView)
async def show_comparison(
    comparison_id: ComparisonId,
    caller: Reader,
    comparison_store: Comparisons,
    job_store: Jobs,
    mlflow_url: MlflowUrl,
) -> Response:
    """Show a comparison and its jobs."""
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    jobs = await job_store.list_by_comparison(comparison_id)
    return await respond(lambda: ComparisonView.of(comparison, jobs, mlflow_url))


@router.get("/{comparison_id:identifier}/report", response_model=Report)
async def report_comparison(
    comparison_id: ComparisonId,
    caller: Reader,
    comparison_store: Comparisons,
    reports: Reports,
    curves: Annotated[bool, Query(description="include each run's curve")] = False,
) -> Response:
    """Compare the variants of a comparison by their runs in MLflow."""
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    report = await reports.report(comparison)
    return await respond(lambda: Report.of(report, with_curves=curves))


@router.get(
    "/{comparison_id:identifier}/document",
    response_class=Response,
    responses={200: {"model": Report, "content": {media_type: {} for media_type in TEXTS}}},
)
async def download_report(
    comparison_id: ComparisonId,
    caller: Reader,
    comparison_store: Comparisons,
    reports: Reports,
    public_url: PublicUrl,
    format: Annotated[Format, Query(description="type of the file")] = "html",  # noqa: A002
) -> Response:
    """Return the report as a file: verdict, curves, table, specs and versions."""
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    mlflow_url = comparison_url(f"{public_url}/mlflow", comparison)
    content = await reports.content(comparison, f"{public_url}/comparisons/{comparison_id}", mlflow_url)
    return await in_thread(report_file, content, format)


@router.get("/{comparison_id:identifier}/verdict", response_model=VerdictView)
async def judge_comparison(
    comparison_id: ComparisonId, caller: Reader, comparison_store: Comparisons, reports: Reports
) -> Response:
    """Judge the claim of a comparison by its finished runs.

    409 if the comparison has no `recipe`.
    """
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    if comparison.recipe is None:
        raise Conflict(f"comparison {comparison_id} has no recipe, and so no claim to judge")
    claim = Claim.model_validate(comparison.recipe)
    verdict = await reports.verdict(comparison, claim)
    return await respond(lambda: VerdictView.of(claim, verdict))


@router.get("/{comparison_id:identifier}/curves", response_model=Curves)
async def show_curves(
    comparison_id: ComparisonId,
    caller: Reader,
    comparison_store: Comparisons,
    reports: Reports,
    metric: Annotated[
        str,
        Query(
            max_length=250,
            pattern=r"^[A-Za-z0-9_./: -]+$",
            description="any metric or probe that the runs log, such as `test_loss`",
        ),
    ] = "accuracy",
) -> Response:
    """Return one metric of all runs of a comparison."""
    comparison = await comparison_store.get(comparison_id, caller.sees_only)
    found = await reports.curves(comparison, metric)
    return await respond(
        lambda: Curves(metric=metric, runs=[RunCurve.of(job, points) for job, points in found])
    )
