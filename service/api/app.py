"""Wiring: the FastAPI application, its parts, and the dispatcher that runs as long as it does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress

from fastapi import Depends, FastAPI, Response
from fastapi.responses import RedirectResponse

from service.api import problems
from service.api.auth import require_token
from service.api.parts import GivenParts, Parts
from service.api.routes import comparisons, jobs
from service.api.schemas import Check, Problem, Readiness
from service.engine.dispatcher import Dispatcher
from service.engine.mlflow_runs import MlflowRunsOverHttp
from service.engine.ray_jobs import RayJobsOverHttp
from service.engine.run_files import RunFiles
from service.settings import Settings
from service.store import database
from service.store.comparisons import ComparisonStore
from service.store.jobs import JobStore

logger = logging.getLogger(__name__)
DESCRIPTION = """Train on many workers with synchronised batch normalisation, and compare it with BN and no BN.

Send a job or a comparison, look at its progress here and at its curves in MLflow. Every `/v1` call needs
`Authorization: Bearer <token>`. Every error answers as problem details (RFC 9457) that name the field and what it takes.
"""
ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": Problem, "content": {problems.MEDIA_TYPE: {}}} for status in (401, 404, 409, 422, 503)
}
SECONDS_TO_CHECK = 5.0


def make_app(settings: Settings) -> FastAPI:
    """Make the application; its parts open when it starts and close when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open_parts(settings) as parts:
            app.state.parts = parts
            task = asyncio.create_task(parts.dispatcher.run(), name="dispatcher")
            task.add_done_callback(_tell_end)
            yield
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    app = FastAPI(title="syncbn", version="1", description=DESCRIPTION, lifespan=lifespan)
    app.state.settings = settings
    problems.install(app)
    for router in (jobs.router, comparisons.router):
        app.include_router(router, dependencies=[Depends(require_token)], responses=ERRORS)

    @app.get("/", include_in_schema=False)
    async def show_docs() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/livez", tags=["health"])
    async def live() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"], responses={503: {"model": Readiness}})
    async def ready(parts: GivenParts, response: Response) -> Readiness:
        """Tell whether the database, Ray and MLflow answer, each within 5 seconds; 503 if one does not."""
        checks = await asyncio.gather(
            _check(database.check(parts.database)), _check(parts.ray.capacity()), _check(parts.mlflow.check())
        )
        readiness = Readiness(
            ready=all(check.ok for check in checks), **dict(zip(("database", "ray", "mlflow"), checks, strict=True))
        )
        response.status_code = 200 if readiness.ready else 503
        return readiness

    return app


@asynccontextmanager
async def _open_parts(settings: Settings) -> AsyncIterator[Parts]:
    engine = database.open_database(settings.database_url, settings.call_timeout_seconds)
    ray = RayJobsOverHttp(settings.ray_address, settings.ray_token(), settings.call_timeout_seconds)
    try:
        await database.migrate(engine)
        mlflow = MlflowRunsOverHttp(
            settings.mlflow_url, settings.mlflow_public_url or settings.mlflow_url, settings.call_timeout_seconds
        )
        job_store, comparison_store, files = JobStore(engine), ComparisonStore(engine), RunFiles(settings.storage)
        dispatcher = Dispatcher(
            job_store,
            comparison_store,
            ray,
            mlflow,
            files,
            mlflow_url=settings.mlflow_url,
            poll_seconds=settings.poll_seconds,
            max_active_jobs=settings.max_active_jobs,
            max_attempts=settings.max_attempts,
        )
        yield Parts(engine, job_store, comparison_store, ray, mlflow, files, dispatcher)
    finally:
        await ray.close()
        await engine.dispose()


def _tell_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.critical("the dispatcher has ended; no job goes on until the service is restarted", exc_info=error)


async def _check(call: Awaitable[object]) -> Check:
    try:
        async with asyncio.timeout(SECONDS_TO_CHECK):
            await call
    except Exception as error:  # whatever is wrong, it is the answer
        return Check(ok=False, detail=str(error) or type(error).__name__)
    return Check(ok=True, detail="answers")
