"""FastAPI application: routes, dependencies and background tasks."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from service.adapters.mlflow import MlflowRuns, MlflowRunsOverHttp
from service.adapters.mlflow_http import MlflowHttp
from service.adapters.ray import RayJobs, RayJobsOverHttp
from service.adapters.run_storage import RunFiles
from service.adapters.secret_files import JobSecrets
from service.adapters.spec_checker import SpecChecker
from service.adapters.webhook_http import WebhookHttp
from service.api import problems, sign_in
from service.api.background import Background
from service.api.dependencies import Components
from service.api.feasibility import Feasibility
from service.api.health import Health
from service.api.json_body import in_thread
from service.api.middleware import BODY_SECONDS, BodyDeadline, DeclaredLength, HeadAsGet
from service.api.mlflow_proxy import PREFIX, UPLOADS, MlflowProxy
from service.api.openapi import document, operation_id
from service.api.prometheus import Metrics
from service.api.routes import cluster as cluster_routes
from service.api.routes import comparisons as comparison_routes
from service.api.routes import jobs as job_routes
from service.api.routes import metrics as metrics_routes
from service.api.routes import sign_in as sign_in_routes
from service.api.routes import tokens as token_routes
from service.api.routes import validation as validation_routes
from service.api.routes import webhooks as webhook_routes
from service.api.schemas import Readiness
from service.api.security_headers import Headers
from service.api.subscriptions import JobFeed
from service.domain.access import RateLimit, Scope
from service.domain.mlflow_access import MAX_JSON_BYTES
from service.engine.admission import Admission
from service.engine.dispatcher import Dispatcher
from service.engine.lease_holder import Replica
from service.engine.metric_alerts import Thresholds
from service.engine.retention import Retention
from service.engine.submitter import Submitter
from service.engine.webhook_sender import WebhookSender
from service.settings import Settings
from service.store.audit import AuditStore
from service.store.comparisons import ComparisonStore
from service.store.credentials import CredentialStore
from service.store.database import Database
from service.store.idempotency import IdempotencyStore
from service.store.jobs import JobStore
from service.store.leases import LeaseStore
from service.store.retention import RetentionStore
from service.store.tokens import TokenStore
from service.store.webhooks import WebhookStore

logger = logging.getLogger(__name__)
DESCRIPTION = """Train on many workers with synchronised batch normalisation, and compare it with BN and no BN.

Send a job or a comparison, look at its progress here and at its curves in MLflow. Every `/v1` call needs
`Authorization: Bearer <token>`; each operation names the scope that the token must have. A POST that is repeated with the same
`Idempotency-Key` is done once. Every error answers as problem details (RFC 9457) that name the field and what it takes.
"""
MAX_BODY_BYTES = 256_000
PROXY_SECONDS = 60.0
"""Between two parts of a request or answer that is forwarded to MLflow."""
FAILURES_PER_SECOND, MOST_FAILURES = 1, 20
"""Requests without a valid token that one address may make."""


class Application(FastAPI):
    """FastAPI application whose security headers cover answers from outside its middleware."""

    def build_middleware_stack(self) -> ASGIApp:
        """Build the middleware stack."""
        settings: Settings = self.state.settings
        limits = {UPLOADS: settings.max_artifact_bytes, f"{PREFIX}/": MAX_JSON_BYTES}
        limited = DeclaredLength(super().build_middleware_stack(), MAX_BODY_BYTES, limits)
        return Headers(HeadAsGet(BodyDeadline(limited, BODY_SECONDS, (UPLOADS,))))

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        return document(self)


def make_app(
    settings: Settings,
    ray: RayJobs | None = None,
    mlflow: MlflowRuns | None = None,
    show_first_token: Callable[[str], None] = print,
) -> FastAPI:
    """Create the application; its components are opened at startup and closed at shutdown.

    `ray` and `mlflow` stand in for those that the settings name. `show_first_token` is handed the secret of the first admin's
    token if one has to be made, and must neither keep nor log it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open_components(settings, ray, mlflow) as components:
            app.state.components = components
            await _ensure_admin(components.tokens, settings, show_first_token)
            await components.replica.start()
            background = Background()  # ended in this order
            background.start("the dispatcher", components.dispatcher.run())
            background.start("the renewal of leases", components.replica.run(components.dispatcher.is_stuck))
            background.start("the watch over jobs", components.watch.run())
            background.start("the sender of messages", components.sender.run())
            background.start("retention", components.retention.run())
            describing = asyncio.create_task(
                in_thread(app.openapi)
            )  # takes half a second, which no request should wait for
            app.state.background, app.state.health = background, Health(components, background)
            yield
            await background.close()
            describing.cancel()

    app = Application(
        title="syncbn",
        version="1.1",
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        generate_unique_id_function=operation_id,
    )
    app.state.settings = settings
    app.max_body_size = MAX_BODY_BYTES
    problems.install(app)
    for router in (
        job_routes.router,
        comparison_routes.router,
        token_routes.router,
        webhook_routes.router,
        validation_routes.router,
        cluster_routes.router,
        metrics_routes.router,
        sign_in_routes.router,
        sign_in.router,
    ):
        app.include_router(router)
    app.router.routes.append(
        Route(
            PREFIX + "{path:path}",
            MlflowProxy(settings.max_attempt_artifact_bytes).forward,
            methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
            include_in_schema=False,
            max_body_size=settings.max_artifact_bytes,
        )
    )

    @app.get("/", include_in_schema=False)
    async def show_docs() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/livez", tags=["health"])
    async def live() -> dict[str, str]:
        """Report that the process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"], responses={503: {"model": Readiness}})
    async def ready(request: Request, response: Response) -> Readiness:
        """Report whether all dependencies answer and jobs are reconciled; 503 if not.

        Each has 5 seconds. An answer may be a second old.
        """
        health: Health = request.app.state.health
        readiness = await health.readiness()
        response.status_code = 200 if readiness.ready else 503
        return readiness

    return app


@asynccontextmanager
async def _open_components(
    settings: Settings, ray: RayJobs | None, mlflow: MlflowRuns | None
) -> AsyncIterator[Components]:
    seconds = settings.call_timeout_seconds
    secret = settings.mlflow_secret.get_secret_value() if settings.mlflow_secret else None
    async with AsyncExitStack() as stack:
        database = Database(settings.database_url, seconds)
        stack.push_async_callback(database.close)
        await database.migrate()
        if ray is None:
            ray = cluster = RayJobsOverHttp(settings.ray_address, settings.ray_token(), seconds)
            stack.push_async_callback(cluster.close)
        mlflow = mlflow or MlflowRunsOverHttp(settings.mlflow_url, seconds, secret)
        mlflow_http = MlflowHttp(settings.mlflow_url, secret, PROXY_SECONDS)
        stack.push_async_callback(mlflow_http.close)
        checker = SpecChecker(settings.check_seconds)
        stack.push_async_callback(checker.close)
        permissions = settings.permissions()
        jobs = JobStore(database, settings.quota_stored_bytes)
        comparisons = ComparisonStore(database, settings.quota_stored_bytes)
        files = RunFiles(settings.storage)
        leases, keys, tokens = LeaseStore(database), IdempotencyStore(database), TokenStore(database)
        credentials = CredentialStore(database)
        metrics = Metrics(jobs, leases)
        replica = Replica(leases, settings.replica_name(), settings.lease_seconds)
        secrets = JobSecrets(settings.secrets_folder)
        attempts = Submitter(
            jobs,
            comparisons,
            ray,
            mlflow,
            files,
            metrics.dispatch_seconds,
            mlflow_url=f"{settings.nodes_url()}/mlflow",
            credentials=credentials,
            permissions=permissions,
            secrets=secrets,
        )
        webhooks = WebhookStore(database)
        outgoing = WebhookHttp(settings.networks(), seconds)
        stack.push_async_callback(outgoing.close)
        dispatcher = Dispatcher(
            replica,
            jobs,
            comparisons,
            ray,
            mlflow,
            files,
            attempts,
            Admission(jobs, ray, attempts, settings.policy),
            Thresholds(webhooks, files),
            metrics.round_seconds,
            poll_seconds=settings.poll_seconds,
            grace_seconds=settings.grace_seconds,
            silence_seconds=settings.silence_seconds,
            start_seconds=settings.start_seconds,
        )
        yield Components(
            database=database,
            jobs=jobs,
            comparisons=comparisons,
            tokens=tokens,
            credentials=credentials,
            audit=AuditStore(database),
            webhooks=webhooks,
            outgoing=outgoing,
            idempotency=keys,
            ray=ray,
            mlflow=mlflow,
            mlflow_http=mlflow_http,
            files=files,
            replica=replica,
            dispatcher=dispatcher,
            sender=WebhookSender(
                webhooks,
                outgoing,
                metrics.webhook_messages,
                poll_seconds=settings.poll_seconds,
                send_seconds=seconds,
            ),
            retention=Retention(
                replica, RetentionStore(database), webhooks, keys, credentials, files, settings.retention()
            ),
            watch=JobFeed(jobs, tokens, settings.poll_seconds, settings.streams_per_token),
            metrics=metrics,
            permissions=permissions,
            feasibility=Feasibility(ray, checker),
            secrets=secrets,
            rates=RateLimit(settings.rate_per_second, settings.rate_burst),
            failures=RateLimit(FAILURES_PER_SECOND, MOST_FAILURES),
            public_url=settings.browser_url(),
        )


async def _ensure_admin(tokens: TokenStore, settings: Settings, show: Callable[[str], None]) -> None:
    given = settings.token.get_secret_value() if settings.token else None
    await tokens.ensure_admin(given, show)
    known = await tokens.find(given) if given else None
    if known and not (known.is_valid(datetime.now(UTC)) and Scope.ADMIN in known.scopes):
        logger.warning("SYNCBN_TOKEN is the secret of %s, which is no valid one of an admin; choose another", known.id)
