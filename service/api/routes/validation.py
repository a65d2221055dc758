"""Routes that check a submission without storing it.

No key is needed, and no transaction waits while they call Ray.
"""

from collections.abc import Sequence

from fastapi import APIRouter

from service.adapters.ray import RayJobs
from service.api.auth import Submitter
from service.api.dependencies import Checks, Ray
from service.api.idempotency import KnownCaller
from service.api.json_body import in_thread
from service.api.schemas import SubmitComparison, SubmitJob, Validation
from service.api.submission_checks import SubmissionChecks
from service.domain.comparisons import check_size, choose_baseline, expand, warnings_of
from service.domain.errors import UpstreamUnavailable
from service.domain.resources import Resources, max_resources, min_resources
from service.domain.submission import SubmitOptions
from trainer.jobspec import JobSpec

router = APIRouter(prefix="/v1", route_class=KnownCaller)


@router.post("/jobs:validate", tags=["jobs"])
async def validate_job(body: SubmitJob, caller: Submitter, checks: Checks, ray: Ray) -> Validation:
    """Check a submission without storing it."""
    check_size(body.spec)
    return await _validate(checks, ray, caller.owner, body, body.spec, [body.spec])


@router.post("/comparisons:validate", tags=["comparisons"])
async def validate_comparison(
    body: SubmitComparison, caller: Submitter, checks: Checks, ray: Ray
) -> Validation:
    """Check a comparison without storing it."""
    specs = [spec for _, spec in await in_thread(expand, body.spec, body.matrix, body.variants)]
    choose_baseline(body.axes, body.baseline)
    return await _validate(checks, ray, caller.owner, body, body.spec, specs)


async def _validate(
    checks: SubmissionChecks,
    ray: RayJobs,
    owner: str,
    options: SubmitOptions,
    base: JobSpec,
    specs: Sequence[JobSpec],
) -> Validation:
    """Check names, and return the resources needed and whether the cluster has them."""
    await checks.check(owner, specs, options, to_store=False)
    least, most = (
        Resources(max(need.cpus for need in needs), max(need.gpus for need in needs))
        for needs in ([min_resources(spec) for spec in specs], [max_resources(spec) for spec in specs])
    )
    try:
        fits: bool | None = least.fits((await ray.cluster()).total)
    except UpstreamUnavailable:
        fits = None
    return Validation(
        jobs=len(specs),
        spec=base,
        min_resources=least,
        max_resources=most,
        fits=fits,
        warnings=warnings_of(specs),
    )
