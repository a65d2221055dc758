"""Page of a job, and its buttons that cancel, pause, resume and clone."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from service.adapters.mlflow import MlflowRuns
from service.adapters.mlflow_values import flatten
from service.api.dependencies import JobId, Jobs, Mlflow, WakeDispatcher
from service.api.json_body import in_thread
from service.api.routes.jobs import Add, Derive, Unpause
from service.api.schemas import ChangeJob, EventView, JobView
from service.api.web.forms import as_yaml, read_form, read_mapping, spec_yaml, validated
from service.api.web.jobs import MLFLOW
from service.api.web.pages import HEADERS, PageRoute, Reader, Submitter, page, see
from service.domain.access import Caller, Scope
from service.domain.advice import Advice
from service.domain.errors import NotFound, UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import Job
from service.domain.statistics import Curve, finite_points
from service.domain.submission import clone, resume
from service.engine.job_advice import read_advice
from service.rendering.series import band_of, thin
from service.rendering.svg import Frame, curves_chart
from service.store.jobs import JobStore
from trainer.jobspec import JobSpec

CURVE_SECONDS = 3.0
"""Time for MLflow's answers; the page is shown without curves after it."""
MAX_TABLE_POINTS = 12
MAX_METRIC_CHARS = 250

router = APIRouter(prefix="/jobs", include_in_schema=False, route_class=PageRoute)


@dataclass(frozen=True)
class Difference:
    """Field of a spec that differs from its parent's."""

    path: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Parent:
    """Job that another one was made from."""

    id: str
    verb: str
    differences: list[Difference] | None
    """None: the parent does not exist for the caller."""


@router.get("/{job_id:identifier}")
async def show_job(
    request: Request, job_id: JobId, caller: Reader, job_store: Jobs, mlflow: Mlflow
) -> Response:
    """Show a job."""
    job = await job_store.get(job_id, caller.sees_only)
    # A poll that replaces only the state needs no curves, which cost a call per metric.
    is_poll_of_state = request.headers.get("HX-Target") == "live"
    curves = {} if is_poll_of_state else await read_job_curves(job, mlflow)
    return page(
        request,
        "job.html",
        caller,
        job=JobView.of(job, MLFLOW),
        events=[EventView.model_validate(event) for event in await job_store.events_of(job.id)],
        curves=curves,
        advice=None if is_poll_of_state else await read_job_advice(job, mlflow),
        charts=await in_thread(charts_of, curves or {}),
        table=curve_table(curves or {}),
        parent=await parent_of(job, caller, job_store),
        spec=spec_yaml(job.spec),
        resolved=as_yaml(job.spec.model_dump(mode="json")),
        may_change=caller.may(Scope.SUBMIT),
        ran_seconds=job.seconds_run(datetime.now(UTC)),
    )


@router.get("/{job_id:identifier}/curves.json")
async def show_curve(
    job_id: JobId,
    caller: Reader,
    job_store: Jobs,
    mlflow: Mlflow,
    metric: Annotated[str, Query(max_length=MAX_METRIC_CHARS)],
) -> Response:
    """Return a drawn curve, for the chart that can be zoomed."""
    job = await job_store.get(job_id, caller.sees_only)
    curve = (await read_job_curves(job, mlflow) or {}).get(metric, [])
    points = await in_thread(lambda: thin(finite_points(curve)))
    x, y = [step for step, _ in points], [value for _, value in points]
    content = {
        "title": f"{metric} by step",
        "metric": metric,
        "x_label": "step",
        "log": "",
        "target": None,
        "x": x,
        "bands": [{"label": metric, "mean": y, "low": y, "high": y}],
    }
    return JSONResponse(content, headers=HEADERS)


@router.post("/{job_id:identifier}/cancel")
async def cancel_job(job_id: JobId, caller: Submitter, job_store: Jobs, wake: WakeDispatcher) -> Response:
    """Request the cancellation of a job."""
    job = await job_store.get(job_id, caller.sees_only)
    await job_store.request_cancel(job.id, caller.owner)
    wake()
    return see(f"/jobs/{job.id}")


@router.post("/{job_id:identifier}/pause")
async def pause_job(job_id: JobId, caller: Submitter, job_store: Jobs, wake: WakeDispatcher) -> Response:
    """Request a pause of a job."""
    job = await job_store.get(job_id, caller.sees_only)
    await job_store.request_pause(job.id, caller.owner)
    wake()
    return see(f"/jobs/{job.id}")


@router.post("/{job_id:identifier}/resume")
async def resume_job(
    request: Request, job_id: JobId, caller: Submitter, unpause: Unpause, derive: Derive, add: Add
) -> Response:
    """Continue a paused job, or an ended one as a new job."""
    if await unpause(job_id, ChangeJob(), caller) is not None:
        return see(f"/jobs/{job_id}")
    return await _submit_from(request, resume, job_id, caller, derive, add)


@router.post("/{job_id:identifier}/clone")
async def clone_job(request: Request, job_id: JobId, caller: Submitter, derive: Derive, add: Add) -> Response:
    """Submit a job with the spec of another one, from step 0."""
    return await _submit_from(request, clone, job_id, caller, derive, add)


async def _submit_from(
    request: Request, make: Callable[..., Job], job_id: str, caller: Caller, derive: Derive, add: Add
) -> Response:
    form = await read_form(request)
    overrides = await read_mapping("overrides", form.text("overrides"))
    change = validated(ChangeJob, {"name": form.text("name") or None, "overrides": overrides})
    made = await add(await derive(make, job_id, change, caller))
    return see(f"/jobs/{made.id}")


async def read_job_curves(job: Job, mlflow: MlflowRuns) -> dict[str, Curve] | None:
    """Return the curves of a job by metric, or None if MLflow does not answer in time."""
    if (run_id := job.mlflow_run_id) is None:
        return {}
    metrics = [*job.spec.evaluation.metrics, "test_loss", "train_loss"]
    try:
        async with asyncio.timeout(CURVE_SECONDS):
            found = await asyncio.gather(*[mlflow.curve(run_id, metric) for metric in metrics])
    except (TimeoutError, UpstreamUnavailable, UpstreamRejected):
        return None
    return {metric: curve for metric, curve in zip(metrics, found, strict=True) if curve}


async def read_job_advice(job: Job, mlflow: MlflowRuns) -> Advice | None:
    """Return the advice, or None for one worker or if MLflow does not answer."""
    if job.spec.max_workers == 1:
        return None
    try:
        async with asyncio.timeout(CURVE_SECONDS):
            return await read_advice(job, mlflow)
    except (TimeoutError, UpstreamUnavailable, UpstreamRejected):
        return None


def charts_of(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Return a chart of each curve as SVG, by metric."""
    return {
        metric: curves_chart(
            [band_of(metric, [curve])],
            Frame(title=f"{metric} by step", x_label="step", y_label=metric),
        )
        for metric, curve in curves.items()
    }


def curve_table(curves: Mapping[str, Curve]) -> list[tuple[int, list[float | None]]]:
    """Return rows of a step and the value of each curve, thinned to a few steps.

    The first and the last step stay.
    """
    values = [dict(curve) for curve in curves.values()]
    steps = sorted({step for curve in values for step in curve})
    if len(steps) > MAX_TABLE_POINTS:
        last = len(steps) - 1
        places = {round(index * last / (MAX_TABLE_POINTS - 1)) for index in range(MAX_TABLE_POINTS)}
        steps = [steps[place] for place in sorted(places)]
    return [(step, [curve.get(step) for curve in values]) for step in steps]


async def parent_of(job: Job, caller: Caller, jobs: JobStore) -> Parent | None:
    """Return the parent of a job with the differences of its spec, if it has one."""
    parent_id = job.resumed_from or job.cloned_from
    if parent_id is None:
        return None
    verb = "Resumed" if job.resumed_from else "Cloned"
    try:
        parent = await jobs.get(parent_id, caller.sees_only)
    except NotFound:
        return Parent(parent_id, verb, None)
    return Parent(parent_id, verb, differences(parent.spec, job.spec))


def differences(before: JobSpec, after: JobSpec) -> list[Difference]:
    """Return the fields in which two resolved specs differ; a missing one is None."""
    old, new = (flatten(spec.model_dump(mode="json")) for spec in (before, after))
    paths = dict.fromkeys((*old, *new))
    return [
        Difference(path, old.get(path), new.get(path)) for path in paths if old.get(path) != new.get(path)
    ]
