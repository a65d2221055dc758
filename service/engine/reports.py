"""Reading the curves of a comparison's runs from MLflow, and making its report of them."""

import asyncio
from collections.abc import Sequence

from service.domain.comparisons import Comparison
from service.domain.jobs import JobSummary
from service.domain.reports import ComparisonReport, make_report
from service.domain.statistics import Curve
from service.engine.mlflow_runs import MlflowRuns
from trainer.spec import JobSpec

READS_AT_ONCE = 8


async def report(
    comparison: Comparison, jobs: Sequence[JobSummary], specs: Sequence[JobSpec], mlflow: MlflowRuns
) -> ComparisonReport:
    """Report on a comparison by what MLflow holds now."""
    return make_report(comparison, jobs, specs, await read_curves(jobs, comparison.metric, mlflow))


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
