"""Checks of a submission beyond its schema.

Permissions, names, memory, secrets, priority and disk space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from service.adapters.ray import RayJobs
from service.adapters.run_storage import RunFiles
from service.adapters.secret_files import JobSecrets
from service.adapters.spec_checker import SpecChecker
from service.domain.errors import UpstreamUnavailable
from service.domain.resources import Cluster
from service.domain.scheduling import Policy
from service.domain.submission import SubmitOptions
from trainer.jobspec import Allowlist, InvalidField, JobSpec, ModelSize, min_worker_bytes

SMALL_BYTES = 1 << 30
"""Memory below which a spec is not compared with the cluster, which would need two calls to Ray."""


@dataclass(frozen=True)
class SubmissionChecks:
    """Checks against the operator's settings, libraries and the cluster."""

    permissions: Allowlist
    secrets: JobSecrets
    files: RunFiles
    checker: SpecChecker
    ray: RayJobs
    policy: Policy

    async def check(
        self, owner: str, specs: Sequence[JobSpec], options: SubmitOptions, *, to_store: bool = True
    ) -> dict[str, str]:
        """Check the specs of a submission, and return its secrets as full references.

        Raises InvalidField or NotAllowed for the first field that is wrong; StorageFull if jobs are to be
        stored and the storage is full. An upstream that does not answer passes.
        """
        most = self.policy.quota_of(owner).priority
        if most is not None and options.priority > most:
            raise InvalidField("priority", options.priority, f"must be at most {most} for the owner {owner}")
        for spec in specs:
            self.permissions.check(spec)
        await self._check_memory(specs, await self.checker.check(specs))
        if to_store:
            await self.files.ensure_space()
        return await self.secrets.resolve(owner, options.secrets)

    async def _check_memory(self, specs: Sequence[JobSpec], sizes: Sequence[ModelSize | None]) -> None:
        need, largest, size = max(
            ((min_worker_bytes(spec, size), spec, size) for spec, size in zip(specs, sizes, strict=True)),
            key=lambda found: found[0],
        )
        # Small jobs fit every node; they are accepted without asking Ray.
        if need > SMALL_BYTES:
            try:
                cluster = await self.ray.cluster()
            except UpstreamUnavailable:
                return
            refuse_memory(largest, size, cluster)


def refuse_memory(spec: JobSpec, size: ModelSize | None, cluster: Cluster) -> None:
    """Raise InvalidField if no node has the memory that a worker needs."""
    most, need = cluster.largest_node_bytes, min_worker_bytes(spec, size)
    if most is None or need <= most:
        return
    must = (
        f"must fit into the memory of a node, {most / 1e9:,.1f} GB at most; weights, gradients, optimizer "
        "state, "
        "one batch with what backward needs of it, and generated data take a worker at least "
        f"{need / 1e9:,.1f} GB"
    )
    # Name the field that the user can change: the batch size if a batch of one would fit.
    least = spec.model_copy(update={"global_batch_size": 1, "gradient_accumulation_steps": 1})
    if min_worker_bytes(least, size) <= most:
        raise InvalidField("spec.global_batch_size", spec.global_batch_size, must)
    raise InvalidField(
        "spec", f"{spec.model.name} on {spec.data.name}, batches of {spec.global_batch_size:,}", must
    )
