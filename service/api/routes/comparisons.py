"""Routes for comparisons."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.adapters.mlflow import read_curves
from service.api.auth import Reader, Submitter
from service.api.dependencies import GivenComponents
from service.api.idempotency import Route
from service.api.json_body import in_thread, respond
from service.api.path_params import ComparisonId
from service.api.schemas import ComparisonView, Curves, Report, RunCurve, SubmitComparison
from service.domain.comparisons import Comparison, choose_baseline, describe, expand
from service.domain.jobs import LONGEST_NAME, new_id
from service.domain.reports import make_report

router = APIRouter(prefix="/v1/comparisons", tags=["comparisons"], route_class=Route)


@router.post("", status_code=202)
async def submit_comparison(
    body: SubmitComparison, caller: Submitter, components: GivenComponents, response: Response
) -> ComparisonView:
    """Submit a comparison: one job per point of its matrix, in one transaction."""
    points = await in_thread(expand, body.spec, body.matrix, body.variants)
    for _, spec in points:
        components.permissions.check(spec)
    await components.feasibility.check([spec for _, spec in points])
    await components.files.ensure_space()
    secrets = await components.secrets.resolve(caller.owner, body.secrets)
    comparison = Comparison(
        id=new_id("comparison"),
        owner=caller.owner,
        name=body.name,
        matrix=body.axes,
        baseline=choose_baseline(body.axes, body.baseline),
        metric=body.metric,
        target=body.target,
        created_at=datetime.now(UTC),
    )
    jobs = [
        body.job(
            owner=caller.owner,
            name=describe(variant)[:LONGEST_NAME],
            spec=spec,
            secrets=secrets,
            comparison_id=comparison.id,
            variant=variant,
        )
        for variant, spec in points
    ]
    await components.comparisons.add(comparison, jobs)
    components.database.after_commit(components.dispatcher.wake)
    response.headers["Location"] = f"/v1/comparisons/{comparison.id}"
    return ComparisonView.of(comparison, jobs, components.mlflow_public_url)


@router.get("/{comparison_id:identifier}", response_model=ComparisonView)
async def show_comparison(comparison_id: ComparisonId, caller: Reader, components: GivenComponents) -> Response:
    """Show a comparison and its jobs."""
    comparison = await components.comparisons.get(comparison_id, caller.sees_only)
    jobs = await components.jobs.list_by_comparison(comparison_id)
    return await respond(lambda: ComparisonView.of(comparison, jobs, components.mlflow_public_url))


@router.get("/{comparison_id:identifier}/report", response_model=Report)
async def report_comparison(
    comparison_id: ComparisonId,
    caller: Reader,
    components: GivenComponents,
    curves: Annotated[bool, Query(description="include each run's curve")] = False,
) -> Response:
    """Compare the variants of a comparison by their runs in MLflow."""
    comparison = await components.comparisons.get(comparison_id, caller.sees_only)
    jobs = await components.jobs.list_by_comparison(comparison_id)
    specs = await components.jobs.specs_of(comparison_id)
    found = await read_curves(jobs, comparison.metric, components.mlflow)
    return await respond(lambda: Report.of(make_report(comparison, jobs, specs, found), with_curves=curves))


@router.get("/{comparison_id:identifier}/curves", response_model=Curves)
async def show_curves(
    comparison_id: ComparisonId,
    caller: Reader,
    components: GivenComponents,
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
    await components.comparisons.get(comparison_id, caller.sees_only)
    jobs = await components.jobs.list_by_comparison(comparison_id)
    curves = await read_curves(jobs, metric, components.mlflow)

    def make() -> Curves:
        runs = [RunCurve(job_id=job.id, seed=job.seed, state=job.state, points=list(curves[job.id])) for job in jobs]
        return Curves(metric=metric, runs=runs)

    return await respond(make)
