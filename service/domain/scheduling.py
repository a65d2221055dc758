"""Scheduling: the queued jobs to submit next, and why the others wait."""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
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
    preemptible: bool = False
    preempted_by: str | None = None
    """Id of the job that it gives, or gave, its resources to."""
    is_stopping: bool = False
    """Whether it was asked to end, so that its resources will be free."""


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


@dataclass(frozen=True)
class Plan:
    """Plan: jobs to submit, and reasons of the others."""

    admitted: list[SchedulableJob]
    """Jobs to submit, in order."""
    reasons: dict[str, str]
    """Reasons of the other jobs for waiting, by id."""
    preempted: dict[str, str] = field(default_factory=dict)
    """Ids of active jobs to preempt, and of the jobs that get their resources."""


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

    Jobs are ordered by starvation (not preemptible, and queued for longer than `policy.starvation`; oldest
    first), then priority,
    then dominant share of the owner (smallest first), then age. A job is admitted only if its whole gang fits
    the free resources and the quota of its owner. While the first job in this order waits for resources, or
    the first one of an owner for the quota, later jobs that fit may pass it (backfill), but only for
    `policy.backfill`; after that, free resources are reserved for it. So every job that fits the cluster and
    its owner's quota is admitted eventually, provided that other jobs end.

    The first job that waits for resources may preempt active jobs that are preemptible and of a lower
    priority: a minimal set of them, the lowest priorities and the youngest jobs first, and only if it fits
    without them. Until it is admitted it is the first of its priority, and jobs after it may not pass it. A
    preempted job does not preempt others while it waits.
    """
    queue, running, found = {job.id: job for job in waiting}, list(active), Plan([], {}, {})
    preemptors = {job.preempted_by for job in (*queue.values(), *active)}
    # These jobs cannot be admitted by this plan, whatever else is running; they do not reserve resources.
    for job in list(queue.values()):
        if job.not_before is not None and job.not_before > now:
            found.reasons[job.id] = f"tried again at {job.not_before:%H:%M:%S} UTC"
        elif not job.min_resources.fits(cluster.total):
            found.reasons[job.id] = f"needs {job.min_resources}, but the whole cluster has {cluster.total}"
        elif not _quota(policy, job).allows(1, job.max_resources):
            found.reasons[job.id] = f"may hold {job.max_resources}, more than the quota of {job.owner}"
        else:
            continue
        del queue[job.id]
    # The order is computed again after each admission, because it changes the owners' shares.
    while queue:
        chosen = _next(queue.values(), running, cluster, preemptors, policy, now, found)
        if chosen is None:
            break
        del queue[chosen.id]
        found.reasons.pop(chosen.id, None)
        found.admitted.append(chosen)
        running.append(replace(chosen, preemptible=False))  # not by this plan
    return found


def _next(
    queue: Collection[SchedulableJob],
    running: Sequence[SchedulableJob],
    cluster: Cluster,
    preemptors: Set[str | None],
    policy: Policy,
    now: datetime,
    found: Plan,
) -> SchedulableJob | None:
    """Return the first job that may start, and set the reasons of those before it.

    Also adds the jobs that the first one to wait for resources preempts; no job may start then.
    """
    held: dict[str, Resources] = {}
    # An elastic job counts at its maximum, since Ray may let it grow to that at any time.
    counts: dict[str, int] = {}
    for job in running:
        held[job.owner] = held.get(job.owner, Resources()) + job.max_resources
        counts[job.owner] = counts.get(job.owner, 0) + 1

    def rank(job: SchedulableJob) -> tuple[object, ...]:
        # A preemptible job would lose its resources again to the first one that it overtakes.
        if now - job.queued_at >= policy.starvation and not job.preemptible:
            # Starving jobs are ordered only by age. The id makes the order total, so that replicas agree.
            return (0, job.queued_at, job.id)
        share = held.get(job.owner, Resources()).share_of(cluster.total)
        return (1, -job.priority, job.id not in preemptors, share, job.queued_at, job.id)

    reasons, free = found.reasons, _free(running, cluster)
    kept_for: SchedulableJob | None = None
    is_kept = False
    quota_kept_for: dict[str, SchedulableJob] = {}
    for job in sorted(queue, key=rank):
        owners = held.get(job.owner, Resources()) + job.max_resources
        first = quota_kept_for.get(job.owner)
        # Quotas come before resources: a job without quota must not reserve resources for itself.
        if first is not None and now - first.queued_at >= policy.backfill:
            reasons[job.id] = f"waits behind {first.id}, which has waited longer for the quota of {job.owner}"
        elif not _quota(policy, job).allows(counts.get(job.owner, 0) + 1, owners):
            reasons[job.id] = f"waits for the quota of {job.owner}"
            quota_kept_for.setdefault(job.owner, job)
        elif kept_for is not None and is_kept and job.id not in preemptors:
            what = "preempts others" if now - kept_for.queued_at < policy.backfill else "has waited longer"
            reasons[job.id] = f"waits behind {kept_for.id}, which {what} for {kept_for.min_resources}"
        elif len(running) >= policy.max_active or not job.min_resources.fits(free):
            is_full = len(running) >= policy.max_active
            what = f"one of {policy.max_active} active jobs to end" if is_full else str(job.min_resources)
            reasons[job.id] = f"waits for {what}"
            # Only the first job reserves and preempts; otherwise a long queue would block all backfill.
            if kept_for is None:
                kept_for, victims = job, _victims(job, running, cluster, policy)
                found.preempted.update(dict.fromkeys(victims, job.id))
                has_waited = now - job.queued_at >= policy.backfill
                is_kept = has_waited or bool(victims) or not preemptors.isdisjoint(one.id for one in queue)
        else:
            return job
    return None


def _victims(
    job: SchedulableJob, running: Sequence[SchedulableJob], cluster: Cluster, policy: Policy
) -> list[str]:
    """Return the ids of the jobs that `job` preempts; none if it need not or cannot."""
    if job.preempted_by is not None:
        return []
    stopping = [one.id for one in running if one.is_stopping]
    # By our count alone: Ray reports resources of jobs that have just ended as used for some seconds.
    held = sum((one.max_resources for one in running if not one.is_stopping), Resources())
    has_slot = len(running) - len(stopping) < policy.max_active
    if has_slot and job.min_resources.fits(cluster.total - held):
        return []

    def fits_without(gone: Sequence[str]) -> bool:
        left = [one for one in running if one.id not in gone]
        # An elastic job may hold as little as its minimum.
        freed = sum((one.min_resources for one in running if one.id in gone and one.has_workers), Resources())
        free = _free(left, replace(cluster, free=cluster.free + freed))
        return len(left) < policy.max_active and job.min_resources.fits(free)

    possible = [one for one in running if _may_preempt(job, one)]
    possible.sort(key=lambda one: (one.priority, -one.queued_at.timestamp(), one.id))
    chosen: list[str] = []
    for one in possible:
        chosen.append(one.id)
        if fits_without([*stopping, *chosen]):
            break
    else:
        return []
    for name in reversed(chosen[:-1]):
        without = [other for other in chosen if other != name]
        if fits_without([*stopping, *without]):
            chosen = without
    return chosen


def _may_preempt(job: SchedulableJob, other: SchedulableJob) -> bool:
    return other.preemptible and other.priority < job.priority and not other.is_stopping


def _free(running: Sequence[SchedulableJob], cluster: Cluster) -> Resources:
    """Return the free resources.

    They are the smaller of our count and Ray's, less pending submissions.
    """
    ours, not_placed = Resources(), Resources()
    for job in running:
        ours += job.max_resources
        if not job.has_workers:
            not_placed += job.max_resources
    # Our count lacks other Ray jobs and drivers; Ray's lacks submissions whose workers have not started.
    return (cluster.total - ours).at_most(cluster.free - not_placed)


def _quota(policy: Policy, job: SchedulableJob) -> Quota:
    return policy.quotas.get(job.owner, policy.default_quota)
