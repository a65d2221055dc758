"""Dependencies of the routes: components of the service, and path parameters."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Path, Request
from starlette.convertors import Convertor, register_url_convertor

from service.adapters.mlflow import MlflowRuns
from service.adapters.mlflow_http import MlflowHttp
from service.adapters.ray import RayJobs
from service.adapters.run_storage import RunFiles
from service.adapters.webhook_http import WebhookHttp
from service.api.prometheus import Metrics
from service.api.submission_checks import SubmissionChecks
from service.api.subscriptions import JobFeed
from service.domain.access import RateLimit
from service.domain.scheduling import Policy
from service.engine.comparison_reports import ComparisonReports
from service.engine.dispatcher import Dispatcher
from service.engine.lease_holder import LeaseHolder
from service.engine.retention import Retention
from service.engine.webhook_sender import WebhookSender
from service.store.audit import AuditStore
from service.store.comparisons import ComparisonStore
from service.store.credentials import CredentialStore
from service.store.database import Database
from service.store.idempotency import IdempotencyStore
from service.store.jobs import JobStore
from service.store.tokens import TokenStore
from service.store.webhooks import WebhookStore

MAX_LARGE_REQUESTS = 2


@dataclass(frozen=True)
class Components:
    """Components of the service."""

    database: Database
    jobs: JobStore
    comparisons: ComparisonStore
    tokens: TokenStore
    credentials: CredentialStore
    audit: AuditStore
    webhooks: WebhookStore
    outgoing: WebhookHttp
    idempotency: IdempotencyStore
    ray: RayJobs
    mlflow: MlflowRuns
    mlflow_http: MlflowHttp
    files: RunFiles
    reports: ComparisonReports
    replica: LeaseHolder
    dispatcher: Dispatcher
    sender: WebhookSender
    retention: Retention
    feed: JobFeed
    metrics: Metrics
    checks: SubmissionChecks
    rates: RateLimit
    """Rate limit of requests per token."""
    failures: RateLimit
    """Rate limit of requests without a valid token per address."""
    policy: Callable[[], Policy]
    public_url: str
    """URL of the service for browsers. Links are not stored, since the URL may change between two starts."""
    large_requests: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_LARGE_REQUESTS))
    """Limit on concurrent requests with large bodies, so that they do not delay other requests."""
    keys_in_flight: set[tuple[str, str]] = field(default_factory=set)
    """Owners and idempotency keys of the requests in flight in this process."""

    @property
    def mlflow_public_url(self) -> str:
        """URL of MLflow's pages for browsers."""
        return f"{self.public_url}/mlflow"


def components_of(request: Request) -> Components:
    """Return the components of the application of a request."""
    components: Components = request.app.state.components
    return components


def _component(name: str) -> Any:
    async def get(request: Request) -> Any:  # not in a thread, of which a storage that hangs may leave none
        return getattr(components_of(request), name)

    return Depends(get)


async def _wake_dispatcher(request: Request) -> Callable[[], None]:
    components = components_of(request)
    return lambda: components.database.after_commit(components.dispatcher.wake)


Audit = Annotated[AuditStore, _component("audit")]
Checks = Annotated[SubmissionChecks, _component("checks")]
Comparisons = Annotated[ComparisonStore, _component("comparisons")]
Credentials = Annotated[CredentialStore, _component("credentials")]
Feed = Annotated[JobFeed, _component("feed")]
Files = Annotated[RunFiles, _component("files")]
Jobs = Annotated[JobStore, _component("jobs")]
Mlflow = Annotated[MlflowRuns, _component("mlflow")]
MlflowUrl = Annotated[str, _component("mlflow_public_url")]
SchedulingPolicy = Annotated[Callable[[], Policy], _component("policy")]
PublicUrl = Annotated[str, _component("public_url")]
Ray = Annotated[RayJobs, _component("ray")]
Reports = Annotated[ComparisonReports, _component("reports")]
ServiceMetrics = Annotated[Metrics, _component("metrics")]
Tokens = Annotated[TokenStore, _component("tokens")]
WakeDispatcher = Annotated[Callable[[], None], Depends(_wake_dispatcher)]
"""Starts a tick of the dispatcher when the transaction of the request is committed."""
WebhookClient = Annotated[WebhookHttp, _component("outgoing")]
Webhooks = Annotated[WebhookStore, _component("webhooks")]


class IdentifierConvertor(Convertor[str]):
    """Identifier up to a slash or colon, so that `GET …:cancel` is a wrong method."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        """Decode the parameter."""
        return value

    def to_string(self, value: str) -> str:
        """Encode the parameter."""
        return value


register_url_convertor("identifier", IdentifierConvertor())

JOB, COMPARISON, TOKEN = r"^job-[0-9a-f]{1,12}$", r"^comparison-[0-9a-f]{1,12}$", r"^token-[0-9a-f]{1,12}$"
JobId = Annotated[str, Path(pattern=JOB, description="such as `job-3f9c2b7a10de`")]
ComparisonId = Annotated[str, Path(pattern=COMPARISON, description="such as `comparison-3f9c2b7a10de`")]
TokenId = Annotated[str, Path(pattern=TOKEN, description="such as `token-3f9c2b7a10de`")]
WebhookId = Annotated[
    str, Path(pattern=r"^webhook-[0-9a-f]{1,12}$", description="such as `webhook-3f9c2b7a10de`")
]
