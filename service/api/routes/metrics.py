"""Route for Prometheus metrics, which name owners and need a scope of their own."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.api.auth import MetricsReader
from service.api.dependencies import ServiceMetrics
from service.api.idempotency import Route

router = APIRouter(tags=["health"], route_class=Route)


@router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
async def read_metrics(_: MetricsReader, metrics: ServiceMetrics) -> Response:
    """Return metrics of jobs, queue, owners and replicas for Prometheus."""
    return Response(await metrics.text(), media_type=CONTENT_TYPE_LATEST)
