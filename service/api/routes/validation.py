"""What the routes that only check a submission answer."""

from collections.abc import Sequence

from service.api.components import Components
from service.api.schemas import Needs, Validation
from service.domain.errors import Unavailable
from service.domain.scheduling import Capacity, least_needs, most_needs
from trainer.spec import JobSpec


async def validation(components: Components, base: JobSpec, specs: Sequence[JobSpec]) -> Validation:
    """Tell what the jobs of these specs would take, and whether the cluster has it."""
    least, most = (
        Capacity(max(need.cpus for need in needs), max(need.gpus for need in needs))
        for needs in ([least_needs(spec) for spec in specs], [most_needs(spec) for spec in specs])
    )
    try:
        fits: bool | None = (await components.ray.cluster()).total.holds(least)
    except Unavailable:
        fits = None
    return Validation(
        jobs=len(specs), spec=base, least=Needs.model_validate(least), most=Needs.model_validate(most), fits=fits
    )
