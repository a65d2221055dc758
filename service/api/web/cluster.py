"""Page of the cluster: resources, nodes, queue, and usage by owner."""

import asyncio
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from service.adapters.ray import RayJobs
from service.api.dependencies import Jobs, Ray, SchedulingPolicy
from service.api.web.pages import PageRoute, Reader, page
from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.resources import Cluster

RAY_SECONDS = 3.0
"""Time for Ray's answer; the page is shown without resources after it."""
MAX_WAITING = 50

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/cluster")
async def show_cluster(
    request: Request, caller: Reader, job_store: Jobs, ray: Ray, policy: SchedulingPolicy
) -> Response:
    """Show the cluster, and the queue and usage as far as the caller sees them."""
    totals = await job_store.totals()
    starving_since = datetime.now(UTC) - policy().starvation
    waiting, has_more = await job_store.first_waiting(MAX_WAITING, caller.sees_only, starving_since)
    usage = {
        owner: used
        for owner, used in sorted(totals.usage.items(), key=lambda item: -item[1].gpu_seconds)
        if caller.sees_only in (None, owner)
    }
    return page(
        request,
        "cluster.html",
        caller,
        cluster=await _cluster(ray),
        counts={state: totals.jobs.get(state, 0) for state in JobState},
        waiting=waiting,
        has_more=has_more,
        usage=usage,
    )


async def _cluster(ray: RayJobs) -> Cluster | None:
    """Return the resources of Ray, or None if it does not answer in time."""
    try:
        async with asyncio.timeout(RAY_SECONDS):
            return await ray.cluster()
    except (TimeoutError, UpstreamUnavailable):
        return None
