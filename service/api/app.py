"""FastAPI application: routes, dependencies and background tasks."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from service.adapters.mlflow import MlflowRuns
from service.adapters.ray import RayJobs
from service.api import problems, sign_in, web
from service.api.health import Health
from service.api.middleware import BODY_SECONDS, BodyDeadline, DeclaredLength, HeadAsGet
from service.api.mlflow_proxy import PREFIX, UPLOADS, MlflowProxy
from service.api.openapi import document, operation_id
from service.api.routes import advice as advice_routes
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
from service.api.web import assets
from service.domain.access import Scope
from service.domain.mlflow_access import MAX_JSON_BYTES
from service.engine.background import Background
from service.settings import Settings
from service.store.tokens import TokenStore
from service.wiring import open_components

logger = logging.getLogger(__name__)
DESCRIPTION = """Train on several workers with synchronised batch normalisation, and compare it with batch
normalisation per worker and with none.

Submit a job or a comparison, and follow it here and in MLflow. Every `/v1` operation needs the header
`Authorization: Bearer <token>`; each names the scope that the token must have. A POST that is repeated with
the same `Idempotency-Key` has an effect once. Errors are problem details (RFC 9457) that name the field, its
value and the rule.
"""
MAX_BODY_BYTES = 256_000


class Application(FastAPI):
    """FastAPI application that also sets security headers outside its middleware."""

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
    """Create the application.

    Its components are opened at startup and closed at shutdown.

    `ray` and `mlflow` replace those of the settings. `show_first_token` gets the secret of the first admin
    token if one is created, and must neither store nor log it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings: Settings = app.state.settings
        async with open_components(settings, *app.state.upstreams) as components:
            app.state.components = components
            await _ensure_tokens(components.tokens, settings, show_first_token)
            await components.replica.start()
            background = Background()  # ended in this order
            background.start("the dispatcher", components.dispatcher.run())
            background.start("the renewal of leases", components.replica.run(components.dispatcher.is_stuck))
            background.start("the watch over jobs", components.feed.run())
            background.start("the sender of messages", components.sender.run())
            background.start("retention", components.retention.run())
            app.state.background, app.state.health = background, Health(components, background)
            yield
            await background.close()

    app = Application(
        title="syncbn",
        version="3.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=operation_id,
    )
    assets.assets()  # raises AssetsMissingError
    app.state.settings, app.state.upstreams = settings, (ray, mlflow)
    app.max_body_size = MAX_BODY_BYTES
    problems.install(app)
    for router in (
        job_routes.router,
        advice_routes.router,
        comparison_routes.router,
        token_routes.router,
        webhook_routes.router,
        validation_routes.router,
        cluster_routes.router,
        metrics_routes.router,
        sign_in_routes.router,
        sign_in.router,
        *web.ROUTERS,
    ):
        app.include_router(router)
    # A plain route of Starlette, which streams bodies and is not part of the document.
    app.router.routes.append(
        Route(
            PREFIX + "{path:path}",
            MlflowProxy(settings.max_attempt_artifact_bytes).forward,
            methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
            include_in_schema=False,
            max_body_size=settings.max_artifact_bytes,
        )
    )

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


async def _ensure_tokens(tokens: TokenStore, settings: Settings, show: Callable[[str], None]) -> None:
    given = settings.token.get_secret_value() if settings.token else None
    await tokens.ensure_admin(given, show)
    if settings.metrics_token is not None:
        await tokens.ensure_metrics(settings.metrics_token.get_secret_value())
    # A configured token that was revoked stays revoked, so the operator must learn why it is rejected.
    known = await tokens.find(given) if given else None
    if known and not (known.is_valid(datetime.now(UTC)) and Scope.ADMIN in known.scopes):
        logger.warning(
            "SYNCBN_TOKEN is the secret of %s, which is no valid token with scope admin; choose another",
            known.id,
        )
