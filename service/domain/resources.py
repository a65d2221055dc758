"""Resources of jobs, nodes and the cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from trainer.jobspec import JobSpec


@dataclass(frozen=True)
class Resources:
    """Amount of resources."""

    cpus: float = 0
    gpus: float = 0

    def __add__(self, other: "Resources") -> "Resources":
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: "Resources") -> "Resources":
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    def fits(self, available: "Resources") -> bool:
        """Return whether this amount is available."""
        return self.cpus <= available.cpus and self.gpus <= available.gpus

    def at_most(self, other: "Resources") -> "Resources":
        """Return the minimum per resource."""
        return Resources(min(self.cpus, other.cpus), min(self.gpus, other.gpus))

    def at_least(self, other: "Resources") -> "Resources":
        """Return the maximum per resource."""
        return Resources(max(self.cpus, other.cpus), max(self.gpus, other.gpus))

    def share_of(self, total: "Resources") -> float:
        """Return the dominant share of `total`.

        Source: Ghodsi et al. 2011, Dominant Resource Fairness.
        """
        return max(
            self.cpus / total.cpus if total.cpus else 0.0, self.gpus / total.gpus if total.gpus else 0.0
        )


NO_RESOURCES = Resources()


@dataclass(frozen=True)
class Node:
    """Resources of a node of the cluster."""

    address: str
    total: Resources
    free: Resources
    memory_bytes: int
    """Memory that Ray gives to its tasks; 0 if it is not known."""
    accelerator_type: str | None = None
    """Type of its GPUs, as Ray names it."""


@dataclass(frozen=True)
class Cluster:
    """Resources of the cluster."""

    total: Resources
    free: Resources
    """Free resources in whole workers: half a free CPU of a node counts as none."""
    placed: frozenset[str] = frozenset()
    """Submissions whose workers have their resources already."""
    largest_node_bytes: int | None = None
    """Memory of the largest node; None if it is not known."""
    nodes: tuple[Node, ...] = ()
    """Live nodes, by address."""
    added: Resources = NO_RESOURCES
    """Resources of nodes that Ray's autoscaler would add, of any type."""

    def of_type(self, accelerator_type: str) -> "Cluster":
        """Return the cluster with the GPUs of one type alone."""
        more = self.added.gpus
        total, free = (gpus + more for gpus in self._gpus_by_type.get(accelerator_type, (0.0, 0.0)))
        return replace(self, total=Resources(self.total.cpus, total), free=Resources(self.free.cpus, free))

    def has_type(self, accelerator_type: str) -> bool:
        """Return whether a node has GPUs of a type."""
        return self._gpus_by_type.get(accelerator_type, (0.0, 0.0))[0] > 0

    def gives_type(self, accelerator_type: str, wanted: str | None) -> bool:
        """Return whether a job is known to get GPUs of a type.

        One that asks for the type `wanted` gets that one; one that asks for none gets those of the only type,
        if there is no other.
        """
        if wanted is not None:
            return wanted == accelerator_type
        return [kind for kind, (total, _) in self._gpus_by_type.items() if total] == [accelerator_type]

    @cached_property
    def _gpus_by_type(self) -> Mapping[str | None, tuple[float, float]]:
        """Total and free GPUs by type, added up once for all jobs."""
        found: dict[str | None, tuple[float, float]] = {}
        for node in self.nodes:
            total, free = found.get(node.accelerator_type, (0.0, 0.0))
            found[node.accelerator_type] = total + node.total.gpus, free + node.free.gpus
        return found

    def grown_to(self, most: Resources) -> "Cluster":
        """Return the cluster with the nodes that Ray's autoscaler would add.

        They bring it to `most` in total. Ray adds nodes for submissions that wait, so these resources must be
        counted before they exist.
        """
        total = self.total.at_least(most)
        added = total - self.total
        return replace(self, total=total, free=self.free + added, added=added)


def min_resources(spec: JobSpec) -> Resources:
    """Return the resources that a job needs to start.

    These are one CPU per worker, and GPUs as requested.
    """
    return _resources(spec, spec.min_workers)


def max_resources(spec: JobSpec) -> Resources:
    """Return the maximum resources of a job while it runs."""
    return _resources(spec, spec.max_workers)


def _resources(spec: JobSpec, workers: int) -> Resources:
    return Resources(cpus=workers, gpus=workers if spec.use_gpu else 0)
