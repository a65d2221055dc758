"""Route for resources of the cluster and numbers of jobs."""

from fastapi import APIRouter

from service.api.auth import Reader
from service.api.dependencies import GivenComponents
from service.api.idempotency import KnownCaller
from service.api.schemas.cluster import ClusterView, Resources
from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.scheduling import Cluster

router = APIRouter(prefix="/v1", tags=["cluster"], route_class=KnownCaller)


@router.get("/cluster")
async def show_cluster(_: Reader, components: GivenComponents) -> ClusterView:
    """Show total and free resources of Ray, and the number of jobs per state, without owners."""
    totals = await components.jobs.totals()
    try:
        cluster: Cluster | None = await components.ray.cluster()
    except UpstreamUnavailable:
        cluster = None
    return ClusterView(
        total=Resources.model_validate(cluster.total) if cluster else None,
        free=Resources.model_validate(cluster.free) if cluster else None,
        jobs={state: totals.jobs.get(state, 0) for state in JobState},
        oldest_queued_at=totals.oldest_queued_at,
    )
