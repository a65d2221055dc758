"""Advice on synchronised statistics of a job, from its run in MLflow."""

from service.adapters.mlflow import MlflowRuns
from service.adapters.mlflow_curves import read_metrics
from service.domain.advice import Advice, advise, needed_metrics
from service.domain.jobs import Job

MAX_METRICS = 600
"""Maximum number of metrics that are read: of 200 layers."""


async def read_advice(job: Job, mlflow: MlflowRuns) -> Advice:
    """Return the advice for a job, with or without a run. Raises UpstreamUnavailable."""
    if (run_id := job.mlflow_run_id) is None:
        return advise(job.spec, {})
    wanted = needed_metrics(await mlflow.metric_names(run_id))[:MAX_METRICS]
    return advise(job.spec, await read_metrics(run_id, wanted, mlflow))
