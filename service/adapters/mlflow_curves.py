"""Curves of several runs or metrics from MLflow, read a few at a time."""

import asyncio
from collections.abc import Sequence

from service.adapters.mlflow import MlflowRuns
from service.domain.jobs import JobSummary
from service.domain.statistics import Curve

READS_AT_ONCE = 8


async def read_curves(jobs: Sequence[JobSummary], metric: str, mlflow: MlflowRuns) -> dict[str, Curve]:
    """Read a metric by job id; empty for jobs without a run or this metric."""
    curves = await _read_all([(job.mlflow_run_id, metric) for job in jobs], mlflow)
    return dict(zip([job.id for job in jobs], curves, strict=True))


async def read_metrics(run_id: str, metrics: Sequence[str], mlflow: MlflowRuns) -> dict[str, Curve]:
    """Read several metrics of a run by name."""
    curves = await _read_all([(run_id, metric) for metric in metrics], mlflow)
    return dict(zip(metrics, curves, strict=True))


async def _read_all(wanted: Sequence[tuple[str | None, str]], mlflow: MlflowRuns) -> list[Curve]:
    gate = asyncio.Semaphore(READS_AT_ONCE)

    async def read(run_id: str | None, metric: str) -> Curve:
        if run_id is None:
            return []
        async with gate:
            return await mlflow.curve(run_id, metric)

    return list(await asyncio.gather(*[read(*each) for each in wanted]))
