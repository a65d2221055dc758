"""Curves of a comparison's runs, as MLflow holds them."""

import asyncio
from collections.abc import Sequence

from service.adapters.mlflow import MlflowRuns
from service.domain.jobs import JobSummary
from service.domain.statistics import Curve

READS_AT_ONCE = 8


async def read_curves(jobs: Sequence[JobSummary], metric: str, mlflow: MlflowRuns) -> dict[str, Curve]:
    """Read a metric by job id; empty for jobs that have none of that name, or no run yet."""
    gate = asyncio.Semaphore(READS_AT_ONCE)

    async def read(job: JobSummary) -> Curve:
        if job.mlflow_run_id is None:
            return []
        async with gate:
            return await mlflow.curve(job.mlflow_run_id, metric)

    curves = await asyncio.gather(*[read(job) for job in jobs])
    return dict(zip([job.id for job in jobs], curves, strict=True))
