"""Scheduling: the queued jobs to submit next, and why the others wait."""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

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


@dataclass(frozen=True)
class Node:
    """Resources of a node of the cluster."""

    address: str
    total: Resources
    free: Resources
    memory_bytes: int
    """Memory that Ray gives to its tasks; 0 if it is not known."""


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

    def grown_to(self, most: Resources) -> "Cluster":
        """Return the cluster with the nodes that Ray's autoscaler would add.

        They bring it to `most` in total. Ray adds nodes for submissions that wait, so these resources must be
        counted before they exist.
        """
        total = self.total.at_least(most)
        return replace(self, total=total, free=self.free + (total - self.total))


@dataclass(frozen=True)
class Quota:
    """Limits of an owner's submitted jobs; None means no limit."""

    jobs: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def allows(self, jobs: int, held: Resources) -> bool:
        """Return whether a usage is within the quota."""
        return (
            (self.jobs is None or jobs <= self.jobs)
            and (self.cpus is None or held.cpus <= self.cpus)
            and (self.gpus is None or held.gpus <= self.gpus)
        )


@dataclass(frozen=True, kw_only=True)
class SchedulableJob:
    """Queued or active job, as the scheduler sees it."""

    id: str
    owner: str
    priority: int = 0
    queued_at: datetime
    not_before: datetime | None = None
    """Earliest start of a job after a failure."""
    min_resources: Resources
    """Resources of the minimum number of workers, which start together."""
    max_resources: Resources
    """Resources of the maximum number of workers, which an elastic job may grow to."""
    submission_id: str = ""
    """Submission id of the current attempt."""
    has_workers: bool = False
    """Whether Ray already counts its workers as used."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Scheduling policy of the operator."""

    max_active: int
    """Maximum number of submitted jobs; each uses memory of Ray's head."""
    backfill: timedelta = timedelta(minutes=5)
    """Time for which smaller jobs may overtake the first job of the queue while it waits for resources."""
    starvation: timedelta = timedelta(hours=6)
    """Time in the queue after which a job goes first, regardless of priorities."""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    default_quota: Quota = Quota()
    autoscaled: Resources = Resources()
    """Resources that Ray's autoscaler may grow the cluster to."""


@dataclass(frozen=True)
class Plan:
    """Plan: jobs to submit, and reasons of the others."""

    admitted: list[SchedulableJob]
    """Jobs to submit, in order."""
    reasons: dict[str, str]
    """Reasons of the other jobs for waiting, by id."""


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


def plan(
    waiting: Iterable[SchedulableJob],
    active: Sequence[SchedulableJob],
    cluster: Cluster,
    policy: Policy,
    now: datetime,
) -> Plan:
    """Return the plan for now.

    Jobs are ordered by starvation (queued for longer than `policy.starvation`, oldest first), then priority,
    then dominant share of the owner (smallest first), then age. A job is admitted only if its whole gang fits
    the free resources and the quota of its owner. While the first job in this order waits for resources, or
    the first one of an owner for the quota, later jobs that fit may pass it (backfill), but only for
    `policy.backfill`; after that, free resources are reserved for it. So every job that fits the cluster and
    its owner's quota is admitted eventually, provided that other jobs end.
    """
    cluster = cluster.grown_to(policy.autoscaled)
    queue = {job.id: job for job in waiting}
    admitted, reasons = list[SchedulableJob](), dict[str, str]()
    # These jobs cannot be admitted by this plan, whatever else is running; they do not reserve resources.
    for job in list(queue.values()):
        if job.not_before is not None and job.not_before > now:
            reasons[job.id] = f"tried again at {job.not_before:%H:%M:%S} UTC"
        elif not job.min_resources.fits(cluster.total):
            reasons[job.id] = f"needs {job.min_resources}, but the whole cluster has {cluster.total}"
        elif not _quota(policy, job).allows(1, job.max_resources):
            reasons[job.id] = f"may hold {job.max_resources}, more than the quota of {job.owner}"
        else:
            continue
        del queue[job.id]
    usage, order = _Usage(active, cluster), _Order(queue.values(), policy, now)
    while (chosen := _next(order.jobs(usage), usage, policy, now, reasons)) is not None:
        order.remove(chosen)
        reasons.pop(chosen.id, None)
        admitted.append(chosen)
        usage.add(chosen)
    return Plan(admitted, reasons)


def _age(job: SchedulableJob) -> tuple[datetime, str]:
    """Return the sort key of a job.

    The id makes the order total, so that replicas agree.
    """
    return job.queued_at, job.id


class _Order:
    """Queue in the order of admission.

    An admission changes the share of one owner. So jobs are sorted once, by priority and owner, and only
    these groups are put in order each time.
    """

    def __init__(self, queue: Iterable[SchedulableJob], policy: Policy, now: datetime) -> None:
        self._starving: dict[str, SchedulableJob] = {}
        self._groups: dict[int, dict[str, dict[str, SchedulableJob]]] = {}
        """Jobs by priority, owner and id."""
        for job in sorted(queue, key=_age):
            if now - job.queued_at >= policy.starvation:
                self._starving[job.id] = job
            else:
                owners = self._groups.setdefault(job.priority, {})
                owners.setdefault(job.owner, {})[job.id] = job

    def remove(self, job: SchedulableJob) -> None:
        """Remove a job."""
        if self._starving.pop(job.id, None) is None:
            del self._groups[job.priority][job.owner][job.id]

    def jobs(self, usage: "_Usage") -> Iterator[SchedulableJob]:
        """Yield the jobs in order."""
        # Starving jobs are ordered only by age.
        yield from self._starving.values()
        for priority in sorted(self._groups, reverse=True):
            by_share: dict[float, list[Iterable[SchedulableJob]]] = {}
            for owner, jobs in self._groups[priority].items():
                by_share.setdefault(usage.share(owner), []).append(jobs.values())
            for share in sorted(by_share):
                yield from heapq.merge(*by_share[share], key=_age)


class _Usage:
    """Resources in use, and those that are free."""

    def __init__(self, active: Iterable[SchedulableJob], cluster: Cluster) -> None:
        self._cluster = cluster
        self._ours, self._not_placed = Resources(), Resources()
        self._held: dict[str, Resources] = {}
        self._counts: dict[str, int] = {}
        self.jobs = 0
        for job in active:
            self.add(job)

    def add(self, job: SchedulableJob) -> None:
        """Count a job at its maximum, which an elastic one may grow to at any time."""
        self.jobs += 1
        self._held[job.owner] = self.held(job.owner) + job.max_resources
        self._counts[job.owner] = self.count(job.owner) + 1
        self._ours += job.max_resources
        if not job.has_workers:
            self._not_placed += job.max_resources

    def held(self, owner: str) -> Resources:
        """Return the resources of an owner's jobs."""
        return self._held.get(owner, Resources())

    def count(self, owner: str) -> int:
        """Return the number of an owner's jobs."""
        return self._counts.get(owner, 0)

    def share(self, owner: str) -> float:
        """Return the dominant share of an owner."""
        return self.held(owner).share_of(self._cluster.total)

    def free(self) -> Resources:
        """Return the free resources.

        They are the smaller of our count and Ray's, less pending submissions.
        """
        # Our count lacks other Ray jobs and drivers; Ray's lacks submissions whose workers have not started.
        return (self._cluster.total - self._ours).at_most(self._cluster.free - self._not_placed)


def _next(
    order: Iterable[SchedulableJob],
    usage: _Usage,
    policy: Policy,
    now: datetime,
    reasons: dict[str, str],
) -> SchedulableJob | None:
    """Return the first job that may start, and set the reasons of those before it."""
    free = usage.free()
    kept_for: SchedulableJob | None = None
    quota_kept_for: dict[str, SchedulableJob] = {}
    for job in order:
        owners = usage.held(job.owner) + job.max_resources
        first = quota_kept_for.get(job.owner)
        # Quotas come before resources: a job without quota must not reserve resources for itself.
        if first is not None and now - first.queued_at >= policy.backfill:
            reasons[job.id] = f"waits behind {first.id}, which has waited longer for the quota of {job.owner}"
        elif not _quota(policy, job).allows(usage.count(job.owner) + 1, owners):
            reasons[job.id] = f"waits for the quota of {job.owner}"
            quota_kept_for.setdefault(job.owner, job)
        elif usage.jobs >= policy.max_active:
            reasons[job.id] = f"waits for one of {policy.max_active} active jobs to end"
        elif kept_for is not None and now - kept_for.queued_at >= policy.backfill:
            reasons[job.id] = (
                f"waits behind {kept_for.id}, which has waited longer for {kept_for.min_resources}"
            )
        elif not job.min_resources.fits(free):
            reasons[job.id] = f"waits for {job.min_resources}"
            # Only the first job reserves; otherwise a long queue would block all backfill.
            kept_for = kept_for or job
        else:
            return job
    return None


def _quota(policy: Policy, job: SchedulableJob) -> Quota:
    return policy.quotas.get(job.owner, policy.default_quota)
