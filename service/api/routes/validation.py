"""Routes that check a submission without storing it.

No key is needed, and no transaction waits while they call Ray.
"""

from collections.abc import Sequence

from fastapi import APIRouter

from service.api.auth import Submitter
from service.api.dependencies import Components, GivenComponents
from service.api.idempotency import KnownCaller
from service.api.json_body import in_thread
from service.api.schemas import Needs, SubmitComparison, SubmitJob, Validation
from service.domain.comparisons import check_size, choose_baseline, expand, warnings_of
from service.domain.errors import UpstreamUnavailable
from service.domain.scheduling import Capacity, least_needs, most_needs
from service.domain.submission import SubmitOptions
from trainer.jobspec import JobSpec

router = APIRouter(prefix="/v1", route_class=KnownCaller)


@router.post("/jobs:validate", tags=["jobs"])
async def validate_job(body: SubmitJob, caller: Submitter, components: GivenComponents) -> Validation:
    """Check a submission without storing it."""
    check_size(body.spec)
    return await _validate(components, caller.owner, body, body.spec, [body.spec])


@router.post("/comparisons:validate", tags=["comparisons"])
async def validate_comparison(body: SubmitComparison, caller: Submitter, components: GivenComponents) -> Validation:
    """Check a comparison without storing it."""
    specs = [spec for _, spec in await in_thread(expand, body.spec, body.matrix, body.variants)]
    choose_baseline(body.axes, body.baseline)
    return await _validate(components, caller.owner, body, body.spec, specs)


async def _validate(
    components: Components, owner: str, terms: SubmitOptions, base: JobSpec, specs: Sequence[JobSpec]
) -> Validation:
    """Check names, and return the resources needed and whether the cluster has them."""
    for spec in specs:
        components.permissions.check(spec)
    await components.feasibility.check(specs)
    await components.secrets.resolve(owner, terms.secrets)
    least, most = (
        Capacity(max(need.cpus for need in needs), max(need.gpus for need in needs))
        for needs in ([least_needs(spec) for spec in specs], [most_needs(spec) for spec in specs])
    )
    try:
        fits: bool | None = (await components.ray.cluster()).total.holds(least)
    except UpstreamUnavailable:
        fits = None
    return Validation(
        jobs=len(specs),
        spec=base,
        least=Needs.model_validate(least),
        most=Needs.model_validate(most),
        fits=fits,
        warnings=warnings_of(specs),
    )
