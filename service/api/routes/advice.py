"""Route for advice on synchronised statistics."""

from fastapi import APIRouter

from service.api.auth import Reader
from service.api.dependencies import JobId, Jobs, Mlflow
from service.api.schemas.advice import AdviceView
from service.engine.job_advice import read_advice

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("/{job_id:identifier}/advice")
async def advise_job(job_id: JobId, caller: Reader, job_store: Jobs, mlflow: Mlflow) -> AdviceView:
    """Show whether synchronised statistics matter for a job, and their cost.

    Advice rests on the probes `variance_share` and `sync_cost` of the run, also while it runs; without them,
    and for a fully connected network, on the number of samples per worker.
    """
    job = await job_store.get(job_id, caller.sees_only)
    return AdviceView.model_validate(await read_advice(job, mlflow))
