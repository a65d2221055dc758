"""What the routes work with, made once when the API starts."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.engine.dispatcher import Dispatcher
from service.engine.mlflow_runs import MlflowRuns
from service.engine.ray_jobs import RayJobs
from service.engine.replica import Replica
from service.engine.run_files import RunFiles
from service.engine.watch import Watch
from service.store.comparisons import ComparisonStore
from service.store.database import Database
from service.store.jobs import JobStore
from trainer.spec import Permissions


@dataclass(frozen=True)
class Components:
    """The service's components."""

    database: Database
    jobs: JobStore
    comparisons: ComparisonStore
    ray: RayJobs
    mlflow: MlflowRuns
    files: RunFiles
    replica: Replica
    dispatcher: Dispatcher
    watch: Watch
    permissions: Permissions
    """What the operator allows specs to reach."""
    mlflow_public_url: str
    """Where a browser finds MLflow; addresses are made of it when they are asked for, since it may change between two starts."""


def components_of(request: Request) -> Components:
    """Find the components of the app that a request came to."""
    components: Components = request.app.state.components
    return components


GivenComponents = Annotated[Components, Depends(components_of)]
