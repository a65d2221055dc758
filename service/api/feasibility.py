"""Checks of a submission beyond its schema: names and memory."""

from collections.abc import Sequence

from service.adapters.ray import RayJobs
from service.adapters.spec_checker import SpecChecker
from service.domain.errors import InvalidField, UpstreamUnavailable
from service.domain.scheduling import Cluster
from trainer.jobspec import JobSpec, ModelSize, min_worker_bytes

SMALL_BYTES = 1 << 30
"""What needs less memory than this is not compared with the cluster's, which would take two calls to Ray."""


class Feasibility:
    """Checks against libraries and the cluster; an upstream that does not answer passes."""

    def __init__(self, ray: RayJobs, checker: SpecChecker) -> None:
        self._ray, self._checker = ray, checker

    async def check(self, specs: Sequence[JobSpec]) -> None:
        """Raise InvalidField for a field with a name or argument that does not exist."""
        sizes = await self._checker.check(specs)
        need, largest, size = max(
            ((min_worker_bytes(spec, size), spec, size) for spec, size in zip(specs, sizes, strict=True)),
            key=lambda found: found[0],
        )
        if need > SMALL_BYTES:
            try:
                cluster = await self._ray.cluster()
            except UpstreamUnavailable:
                return
            refuse_memory(largest, size, cluster)


def refuse_memory(spec: JobSpec, size: ModelSize | None, cluster: Cluster) -> None:
    """Raise InvalidField if no node has the memory that a worker needs."""
    most, need = cluster.largest_node_bytes, min_worker_bytes(spec, size)
    if most is None or need <= most:
        return
    must = (
        f"must fit into the memory of a node, {most / 1e9:,.1f} GB at most; weights, gradients, optimiser state, "
        f"one batch with what backward needs of it, and generated data take a worker at least {need / 1e9:,.1f} GB"
    )
    least = spec.model_copy(update={"global_batch_size": 1, "accumulate": 1})
    if min_worker_bytes(least, size) <= most:
        raise InvalidField("spec.global_batch_size", spec.global_batch_size, must)
    raise InvalidField("spec", f"{spec.model.name} on {spec.data.name}, batches of {spec.global_batch_size:,}", must)
