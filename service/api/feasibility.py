"""Checks of a submission that take more than its fields: whether names exist, and whether a worker has the memory."""

from collections.abc import Sequence

from service.adapters.spec_checker import SpecChecker
from service.domain.errors import InvalidField, Unavailable
from service.domain.scheduling import Cluster
from service.engine.ray_jobs import RayJobs
from trainer.spec import JobSpec, min_worker_bytes

SMALL_BYTES = 1 << 30
"""What needs less memory than this is not compared with the cluster's, which would take two calls to Ray."""


class Feasibility:
    """Checks against the libraries and the cluster. What cannot be checked, since either does not answer, is let pass."""

    def __init__(self, ray: RayJobs, checker: SpecChecker) -> None:
        self._ray, self._checker = ray, checker

    async def check(self, specs: Sequence[JobSpec]) -> None:
        """Raise InvalidField naming the field that cannot work."""
        await self._checker.check(specs)
        largest = max(specs, key=min_worker_bytes)
        if min_worker_bytes(largest) > SMALL_BYTES:
            try:
                cluster = await self._ray.cluster()
            except Unavailable:
                return
            refuse_memory(largest, cluster)


def refuse_memory(spec: JobSpec, cluster: Cluster) -> None:
    """Raise InvalidField if no node of the cluster has the memory that a worker needs at least."""
    need = min_worker_bytes(spec)
    if cluster.largest_node_bytes is not None and need > cluster.largest_node_bytes:
        must = (
            f"must fit into the memory of a node, {cluster.largest_node_bytes / 1e9:,.1f} GB at most; weights, gradients, "
            f"optimiser state, one batch and generated data take a worker at least {need / 1e9:,.1f} GB"
        )
        raise InvalidField(
            "spec", f"{spec.model.name} on {spec.data.name}, batches of {spec.global_batch_size:,}", must
        )
