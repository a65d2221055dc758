"""Route for resources of the cluster and numbers of jobs."""

from fastapi import APIRouter

from service.api.auth import Reader
from service.api.dependencies import Jobs, Ray
from service.api.idempotency import KnownCaller
from service.api.schemas.cluster import ClusterView
from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.scheduling import Cluster

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
