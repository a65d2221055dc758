"""Scheduling: the queued jobs to submit next, and why the others wait."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from trainer.jobspec import JobSpec


@dataclass(frozen=True)
class Capacity:
    """Amount of resources."""

    cpus: float = 0
    gpus: float = 0

    def __add__(self, other: "Capacity") -> "Capacity":
        return Capacity(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: "Capacity") -> "Capacity":
        return Capacity(self.cpus - other.cpus, self.gpus - other.gpus)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    def holds(self, need: "Capacity") -> bool:
        """Return whether `need` fits."""
        return need.cpus <= self.cpus and need.gpus <= self.gpus

    def at_most(self, other: "Capacity") -> "Capacity":
        """Return the minimum per resource."""
        return Capacity(min(self.cpus, other.cpus), min(self.gpus, other.gpus))

    def share_of(self, total: "Capacity") -> float:
        """Return the dominant share of `total` (Ghodsi et al. 2011, Dominant Resource Fairness)."""
        return max(self.cpus / total.cpus if total.cpus else 0.0, self.gpus / total.gpus if total.gpus else 0.0)


@dataclass(frozen=True)
class Cluster:
    """Resources of the cluster."""

    total: Capacity
    free: Capacity
    """What nobody holds, in whole workers: a node with half a CPU free has room for none."""
    placed: frozenset[str] = frozenset()
    """Submissions whose workers have their resources, which are no longer free."""
    largest_node_bytes: int | None = None
    """Memory of the node that has most of it; None: not known."""


@dataclass(frozen=True)
class Quota:
    """Limits of an owner's submitted jobs; None means no limit."""

    jobs: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def takes(self, jobs: int, held: Capacity) -> bool:
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
    """When a job that is tried again may start."""
    least: Capacity
    """What the whole gang of its fewest workers takes."""
    most: Capacity
    """What it may come to hold while it runs: an elastic job takes what is free, up to its largest number of workers."""
    submission_id: str = ""
    """Ray's name for its current attempt."""
    has_workers: bool = False
    """Whether Ray already counts its workers as taken."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Scheduling policy of the operator."""

    most_active: int
    """Jobs that may be with Ray at one time: each costs its head memory."""
    backfill: timedelta = timedelta(minutes=5)
    """How long smaller jobs may pass the first in the queue while that waits for room."""
    patience: timedelta = timedelta(hours=6)
    """After how long in the queue a job goes before all others, whatever their priority."""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    default_quota: Quota = Quota()


@dataclass(frozen=True)
class Plan:
    """Plan: jobs to submit, and reasons of the others."""

    admitted: list[SchedulableJob]
    """In the order in which they go to Ray."""
    reasons: dict[str, str]
    """Why each of the others waits, by id."""


def least_needs(spec: JobSpec) -> Capacity:
    """Return the resources that a job needs to start: a CPU per worker, and GPUs as requested."""
    return _resources(spec, spec.min_workers)


def most_needs(spec: JobSpec) -> Capacity:
    """Return the maximum resources of a job while it runs."""
    return _resources(spec, spec.max_workers)


def _resources(spec: JobSpec, workers: int) -> Capacity:
    return Capacity(cpus=workers, gpus=workers if spec.use_gpu else 0)


def plan(
    waiting: Iterable[SchedulableJob], active: Sequence[SchedulableJob], cluster: Cluster, policy: Policy, now: datetime
) -> Plan:
    """Return the plan for now.

    Who waits longer than `policy.patience` comes first, the oldest before others; then priority; then the owner with the smallest
    dominant share of the cluster; then age. A job is admitted only if its whole gang fits what is free and its owner's quota takes
    it. While the first in this order waits for room, or the first of an owner for its quota, others that fit may pass it, but only
    for `policy.backfill`: then what becomes free is kept for it. So every job that the cluster and its owner's quota can take is
    admitted in the end, as long as others end.
    """
    queue = {job.id: job for job in waiting}
    running, admitted, reasons = list(active), list[SchedulableJob](), dict[str, str]()
    for job in list(queue.values()):
        if job.not_before is not None and job.not_before > now:
            reasons[job.id] = f"tried again at {job.not_before:%H:%M:%S} UTC"
        elif not cluster.total.holds(job.least):
            reasons[job.id] = f"needs {job.least}, but the whole cluster has {cluster.total}"
        elif not _quota(policy, job).takes(1, job.most):
            reasons[job.id] = f"may hold {job.most}, more than the quota of {job.owner}"
        else:
            continue
        del queue[job.id]
    while queue:
        chosen = _next(queue.values(), running, cluster, policy, now, reasons)
        if chosen is None:
            break
        del queue[chosen.id]
        reasons.pop(chosen.id, None)
        admitted.append(chosen)
        running.append(chosen)
    return Plan(admitted, reasons)


def _next(
    queue: Iterable[SchedulableJob],
    running: Sequence[SchedulableJob],
    cluster: Cluster,
    policy: Policy,
    now: datetime,
    reasons: dict[str, str],
) -> SchedulableJob | None:
    """Return the first job that may start, and set the reasons of those before it."""
    held: dict[str, Capacity] = {}
    counts: dict[str, int] = {}
    for job in running:
        held[job.owner] = held.get(job.owner, Capacity()) + job.most
        counts[job.owner] = counts.get(job.owner, 0) + 1

    def rank(job: SchedulableJob) -> tuple[object, ...]:
        if now - job.queued_at >= policy.patience:
            return (0, job.queued_at, job.id)
        share = held.get(job.owner, Capacity()).share_of(cluster.total)
        return (1, -job.priority, share, job.queued_at, job.id)

    free = _free(running, cluster)
    kept_for: SchedulableJob | None = None
    quota_kept_for: dict[str, SchedulableJob] = {}
    for job in sorted(queue, key=rank):
        owners = held.get(job.owner, Capacity()) + job.most
        first = quota_kept_for.get(job.owner)
        if first is not None and now - first.queued_at >= policy.backfill:
            reasons[job.id] = f"waits behind {first.id}, which has waited longer for the quota of {job.owner}"
        elif not _quota(policy, job).takes(counts.get(job.owner, 0) + 1, owners):
            reasons[job.id] = f"waits for the quota of {job.owner}"
            quota_kept_for.setdefault(job.owner, job)
        elif len(running) >= policy.most_active:
            reasons[job.id] = f"waits for one of {policy.most_active} active jobs to end"
        elif kept_for is not None and now - kept_for.queued_at >= policy.backfill:
            reasons[job.id] = f"waits behind {kept_for.id}, which has waited longer for {kept_for.least}"
        elif not free.holds(job.least):
            reasons[job.id] = f"waits for {job.least}"
            kept_for = kept_for or job
        else:
            return job
    return None


def _free(running: Sequence[SchedulableJob], cluster: Cluster) -> Capacity:
    """Return the free resources: the smaller of our count and Ray's, less pending submissions."""
    ours, not_placed = Capacity(), Capacity()
    for job in running:
        ours += job.most
        if not job.has_workers:
            not_placed += job.most
    return (cluster.total - ours).at_most(cluster.free - not_placed)


def _quota(policy: Policy, job: SchedulableJob) -> Quota:
    return policy.quotas.get(job.owner, policy.default_quota)
