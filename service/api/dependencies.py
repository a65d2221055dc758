"""Dependencies of the routes, created once at startup."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.adapters.mlflow import MlflowRuns
from service.adapters.mlflow_http import MlflowHttp
from service.adapters.ray import RayJobs
from service.adapters.run_storage import RunFiles
from service.adapters.secret_files import JobSecrets
from service.adapters.webhook_http import WebhookHttp
from service.api.feasibility import Feasibility
from service.api.prometheus import Metrics
from service.api.subscriptions import JobFeed
from service.domain.access import RateLimit
from service.engine.dispatcher import Dispatcher
from service.engine.lease_holder import Replica
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
from trainer.jobspec import Allowlist

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
    replica: Replica
    dispatcher: Dispatcher
    sender: WebhookSender
    retention: Retention
    watch: JobFeed
    metrics: Metrics
    permissions: Allowlist
    """What the operator allows specs to reach."""
    feasibility: Feasibility
    secrets: JobSecrets
    rates: RateLimit
    """Of requests, by token."""
    failures: RateLimit
    """Of requests without a valid token, by address."""
    public_url: str
    """This service's address for browsers. Links are made of it when they are asked for, since it may change between two starts."""
    large_requests: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_LARGE_REQUESTS))
    """Held while a request with a large body is worked on, so that many of them at once keep no other waiting."""
    keys_in_flight: set[tuple[str, str]] = field(default_factory=set)
    """Owners and keys of the requests that this process is answering."""

    @property
    def mlflow_public_url(self) -> str:
        """URL of MLflow's pages for browsers."""
        return f"{self.public_url}/mlflow"


def components_of(request: Request) -> Components:
    """Return the components of the application of a request."""
    components: Components = request.app.state.components
    return components


async def _given(request: Request) -> Components:
    return components_of(request)  # not in a thread, of which a storage that hangs may leave none


GivenComponents = Annotated[Components, Depends(_given)]
