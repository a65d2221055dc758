"""Wiring: the FastAPI application, its components, and the dispatcher that runs as long as it does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from fastapi import Depends, FastAPI, Response
from fastapi.responses import RedirectResponse

from service.api import problems
from service.api.auth import require_token
from service.api.components import Components, GivenComponents
from service.api.routes import comparisons as comparison_routes
from service.api.routes import jobs as job_routes
from service.api.schemas import Check, Problem, Readiness
from service.engine.admission import Admission
from service.engine.attempts import Attempts
from service.engine.dispatcher import Dispatcher
from service.engine.mlflow_runs import MlflowRuns, MlflowRunsOverHttp
from service.engine.ray_jobs import RayJobs, RayJobsOverHttp
from service.engine.replica import Replica
from service.engine.run_files import RunFiles
from service.engine.watch import Watch
from service.settings import Settings
from service.store.comparisons import ComparisonStore
from service.store.database import Database
from service.store.jobs import JobStore
from service.store.leases import LeaseStore

logger = logging.getLogger(__name__)
DESCRIPTION = """Train on many workers with synchronised batch normalisation, and compare it with BN and no BN.

Send a job or a comparison, look at its progress here and at its curves in MLflow. Every `/v1` call needs
`Authorization: Bearer <token>`. Every error answers as problem details (RFC 9457) that name the field and what it takes.
"""
ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": Problem, "content": {problems.MEDIA_TYPE: {}}} for status in (401, 404, 409, 422, 503)
}
SECONDS_TO_CHECK = 5.0
MOST_BODY_BYTES = 1_000_000


def make_app(settings: Settings, ray: RayJobs | None = None, mlflow: MlflowRuns | None = None) -> FastAPI:
    """Make the application; its components open when it starts and close when it stops.

    `ray` and `mlflow` stand in for those that the settings name.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open_components(settings, ray, mlflow) as components:
            app.state.components = components
            await components.replica.start()
            tasks = [  # ended in this order
                asyncio.create_task(components.dispatcher.run(), name="the dispatcher"),
                asyncio.create_task(components.replica.run(), name="the renewal of leases"),
                asyncio.create_task(components.watch.run(), name="the watch over jobs"),
            ]
            for task in tasks:
                task.add_done_callback(_tell_end)
            yield
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    app = FastAPI(title="syncbn", version="1", description=DESCRIPTION, lifespan=lifespan)
    app.state.settings = settings
    app.max_body_size = MOST_BODY_BYTES
    problems.install(app)
    for router in (job_routes.router, comparison_routes.router):
        app.include_router(router, dependencies=[Depends(require_token)], responses=ERRORS)

    @app.get("/", include_in_schema=False)
    async def show_docs() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/livez", tags=["health"])
    async def live() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"], responses={503: {"model": Readiness}})
    async def ready(components: GivenComponents, response: Response) -> Readiness:
        """Tell whether the database, Ray and MLflow answer, each within 5 seconds; 503 if one does not."""
        checks = await asyncio.gather(
            _check("database", components.database.check()),
            _check("ray", components.ray.cluster()),
            _check("mlflow", components.mlflow.check()),
        )
        readiness = Readiness(
            ready=all(check.ok for check in checks), **dict(zip(("database", "ray", "mlflow"), checks, strict=True))
        )
        response.status_code = 200 if readiness.ready else 503
        return readiness

    return app


@asynccontextmanager
async def _open_components(
    settings: Settings, ray: RayJobs | None, mlflow: MlflowRuns | None
) -> AsyncIterator[Components]:
    seconds = settings.call_timeout_seconds
    public_url = (settings.mlflow_public_url or settings.mlflow_url).rstrip("/")
    async with AsyncExitStack() as stack:
        database = Database(settings.database_url, seconds)
        stack.push_async_callback(database.close)
        await database.migrate()
        if ray is None:
            ray = cluster = RayJobsOverHttp(settings.ray_address, settings.ray_token(), seconds)
            stack.push_async_callback(cluster.close)
        mlflow = mlflow or MlflowRunsOverHttp(settings.mlflow_url, seconds)
        permissions = settings.permissions()
        jobs, comparisons, files = JobStore(database), ComparisonStore(database), RunFiles(settings.storage)
        replica = Replica(LeaseStore(database), settings.replica_name(), settings.lease_seconds)
        attempts = Attempts(
            jobs, comparisons, ray, mlflow, files, mlflow_url=settings.mlflow_url, permissions=permissions
        )
        dispatcher = Dispatcher(
            replica,
            jobs,
            comparisons,
            ray,
            mlflow,
            files,
            attempts,
            Admission(jobs, ray, attempts, settings.policy),
            poll_seconds=settings.poll_seconds,
            grace_seconds=settings.grace_seconds,
            silence_seconds=settings.silence_seconds,
        )
        watch = Watch(jobs, settings.poll_seconds)
        yield Components(
            database, jobs, comparisons, ray, mlflow, files, replica, dispatcher, watch, permissions, public_url
        )


def _tell_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.critical("%s has ended; restart the service", task.get_name(), exc_info=error)


async def _check(name: str, call: Awaitable[object]) -> Check:
    try:
        async with asyncio.timeout(SECONDS_TO_CHECK):
            await call
    except Exception as error:  # whatever is wrong, it is the answer; addresses and the like are for the log alone
        logger.warning("%s is not ready: %s", name, error or type(error).__name__)
        return Check(ok=False, detail="does not answer; the service's log says more")
    return Check(ok=True, detail="answers")
