"""Routes for resources of the cluster, numbers of jobs, and usage of owners."""

from datetime import date
from typing import Annotated

from fastapi import APIRouter, Query

from service.api.auth import Reader
from service.api.dependencies import Jobs, Ray
from service.api.idempotency import KnownCaller
from service.api.schemas.cluster import ClusterView, UsageList, UsageView
from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.resources import Cluster
from service.store.usage import Period

router = APIRouter(prefix="/v1", tags=["cluster"], route_class=KnownCaller)


@router.get("/cluster")
async def show_cluster(_: Reader, job_store: Jobs, ray: Ray) -> ClusterView:
    """Show total and free resources of Ray.

    Also shows the number of jobs per state, without owners.
    """
    totals = await job_store.totals()
    try:
        cluster: Cluster | None = await ray.cluster()
    except UpstreamUnavailable:
        cluster = None
    return ClusterView(
        total=cluster.total if cluster else None,
        free=cluster.free if cluster else None,
        jobs={state: totals.jobs.get(state, 0) for state in JobState},
        oldest_queued_at=totals.oldest_queued_at,
    )


@router.get("/usage")
async def list_usage(
    caller: Reader,
    job_store: Jobs,
    since: Annotated[date | None, Query(description="first day, of UTC; default: no limit")] = None,
    until: Annotated[
        date | None, Query(description="first day after the last one; default: no limit")
    ] = None,
) -> UsageList:
    """List the GPU- and CPU-hours of the caller, or for admins of all owners.

    Attempts count with the resources that they may hold, running ones up to now, and also those of deleted
    jobs.
    """
    found = await job_store.usage(Period(since, until))
    return UsageList(
        usage=[
            UsageView(owner=owner, gpu_hours=used.gpu_seconds / 3600, cpu_hours=used.cpu_seconds / 3600)
            for owner, used in sorted(found.items())
            if caller.sees_only in (None, owner)
        ]
    )
