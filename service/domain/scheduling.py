"""Scheduling: the queued jobs to submit next, and why the others wait."""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from service.domain.resources import NO_RESOURCES, Cluster, Resources


@dataclass(frozen=True)
class Quota:
    """Limits of an owner's active jobs and submissions; None means no limit."""

    jobs: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    priority: int | None = None
    """Maximum priority of a submission."""

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
    accelerator_type: str | None = None
    """Type of its GPUs; None for any."""
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
    autoscaled: Resources = NO_RESOURCES
    """Resources that Ray's autoscaler may grow the cluster to."""

    def quota_of(self, owner: str) -> Quota:
        """Return the quota of an owner.

        The maximum priority is the default one where the owner has none: a limit for all must not miss those
        with other quotas.
        """
        quota = self.quotas.get(owner, self.default_quota)
        return quota if quota.priority is not None else replace(quota, priority=self.default_quota.priority)


@dataclass(frozen=True)
class Plan:
    """Plan: jobs to submit, and reasons of the others."""

    admitted: list[SchedulableJob]
    """Jobs to submit, in order."""
    reasons: dict[str, str]
    """Reasons of the other jobs for waiting, by id."""
    preempted: dict[str, str] = field(default_factory=dict)
    """Ids of active jobs to preempt, and of the jobs that get their resources."""


def plan(
    waiting: Iterable[SchedulableJob],
    active: Sequence[SchedulableJob],
    cluster: Cluster,
    policy: Policy,
    now: datetime,
) -> Plan:
    """Return the plan for now.

    Jobs are ordered by starvation (not preemptible, and queued for longer than `policy.starvation`; oldest
    first), then priority, then dominant share of the owner (smallest first), then age. A job is admitted only
    if its whole gang fits the free resources and the quota of its owner. While the first job in this order
    waits for resources, or the first one of an owner for the quota, later jobs that fit may pass it
    (backfill), but only for `policy.backfill`; after that, free resources are reserved for it. So every job
    that fits the cluster and its owner's quota is admitted eventually, provided that other jobs end.

    The first job that waits for resources may preempt active jobs that are preemptible and of a lower
    priority: a minimal set of them, the lowest priorities and the youngest jobs first, and only if it fits
    without them. Until it is admitted it is the first of its priority, and jobs after it may not pass it. A
    preempted job does not preempt others while it waits.
    """
    cluster = cluster.grown_to(policy.autoscaled)
    queue, found = {job.id: job for job in waiting}, Plan([], {}, {})
    preemptors = {job.preempted_by for job in (*queue.values(), *active) if job.preempted_by}
    # These jobs cannot be admitted by this plan, whatever else is running; they do not reserve resources.
    for job in list(queue.values()):
        if job.not_before is not None and job.not_before > now:
            found.reasons[job.id] = f"tried again at {job.not_before:%H:%M:%S} UTC"
        elif (gpus := _gpus_of_type(job, cluster, policy)) < job.min_resources.gpus:
            needs = f"{job.min_resources.gpus:g} GPUs of type {job.accelerator_type}"
            found.reasons[job.id] = f"needs {needs}, but the whole cluster has {gpus:g}"
        elif not job.min_resources.fits(cluster.total):
            found.reasons[job.id] = f"needs {job.min_resources}, but the whole cluster has {cluster.total}"
        elif not policy.quota_of(job.owner).allows(1, job.max_resources):
            found.reasons[job.id] = f"may hold {job.max_resources}, more than the quota of {job.owner}"
        else:
            continue
        del queue[job.id]
    usage, order = _Usage(active, cluster), _Order(queue.values(), preemptors, policy, now)
    while (chosen := _next(order, usage, policy, found)) is not None:
        order.remove(chosen)
        found.reasons.pop(chosen.id, None)
        found.admitted.append(chosen)
        usage.add(replace(chosen, preemptible=False))  # not by this plan
    return found


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

    def __init__(
        self, queue: Iterable[SchedulableJob], preemptors: Set[str], policy: Policy, now: datetime
    ) -> None:
        self.preemptors = preemptors
        """Ids of the jobs for which others were preempted; each is the first of its priority."""
        self.now = now
        self._starving: dict[str, SchedulableJob] = {}
        self._groups: dict[tuple[int, bool], dict[str, dict[str, SchedulableJob]]] = {}
        """Jobs by rank, owner and id."""
        for job in sorted(queue, key=_age):
            # A preemptible job would lose its resources again to the first one that it overtakes.
            if now - job.queued_at >= policy.starvation and not job.preemptible:
                self._starving[job.id] = job
            else:
                owners = self._groups.setdefault(self._rank(job), {})
                owners.setdefault(job.owner, {})[job.id] = job

    def _rank(self, job: SchedulableJob) -> tuple[int, bool]:
        return -job.priority, job.id not in self.preemptors

    def remove(self, job: SchedulableJob) -> None:
        """Remove a job."""
        if self._starving.pop(job.id, None) is None:
            del self._groups[self._rank(job)][job.owner][job.id]

    def waiting_preemptors(self) -> Iterator[SchedulableJob]:
        """Yield the jobs for which others were preempted."""
        yield from (job for job in self._starving.values() if job.id in self.preemptors)
        for (_, is_other), owners in sorted(self._groups.items()):
            if not is_other:
                yield from (job for jobs in owners.values() for job in jobs.values())

    def jobs(self, usage: "_Usage") -> Iterator[SchedulableJob]:
        """Yield the jobs in order."""
        # Starving jobs are ordered only by age.
        yield from self._starving.values()
        for rank in sorted(self._groups):
            by_share: dict[float, list[Iterable[SchedulableJob]]] = {}
            for owner, jobs in self._groups[rank].items():
                by_share.setdefault(usage.share(owner), []).append(jobs.values())
            for share in sorted(by_share):
                yield from heapq.merge(*by_share[share], key=_age)


class _Usage:
    """Resources in use, and those that are free."""

    def __init__(self, active: Iterable[SchedulableJob], cluster: Cluster) -> None:
        self.cluster = cluster
        self.jobs: list[SchedulableJob] = []
        self._ours, self._not_placed = NO_RESOURCES, NO_RESOURCES
        self._gpus: dict[str | None, float] = defaultdict(float)
        self._gpus_not_placed: dict[str | None, float] = defaultdict(float)
        """GPUs by the type that their jobs ask for."""
        self._held: dict[str, Resources] = {}
        self._counts: dict[str, int] = {}
        for job in active:
            self.add(job)

    def add(self, job: SchedulableJob) -> None:
        """Count a job at its maximum, which an elastic one may grow to at any time."""
        self.jobs.append(job)
        self._held[job.owner] = self.held(job.owner) + job.max_resources
        self._counts[job.owner] = self.count(job.owner) + 1
        self._ours += job.max_resources
        self._gpus[job.accelerator_type] += job.max_resources.gpus
        if not job.has_workers:
            self._not_placed += job.max_resources
            self._gpus_not_placed[job.accelerator_type] += job.max_resources.gpus

    def held(self, owner: str) -> Resources:
        """Return the resources of an owner's jobs."""
        return self._held.get(owner, NO_RESOURCES)

    def count(self, owner: str) -> int:
        """Return the number of an owner's jobs."""
        return self._counts.get(owner, 0)

    def share(self, owner: str) -> float:
        """Return the dominant share of an owner."""
        return self.held(owner).share_of(self.cluster.total)

    def free(self, freed: Resources = NO_RESOURCES) -> Resources:
        """Return the free resources, with those that Ray frees in addition.

        They are the smaller of our count and Ray's, less pending submissions.
        """
        # Our count lacks other Ray jobs and drivers; Ray's lacks submissions whose workers have not started.
        return (self.cluster.total - self._ours).at_most(self.cluster.free + freed - self._not_placed)

    def has_room(
        self, job: SchedulableJob, freed: Resources = NO_RESOURCES, freed_of_type: float = 0
    ) -> bool:
        """Return whether a job fits the free resources, and the free GPUs of its type.

        What Ray frees is free in addition: resources, and the GPUs of the job's type among them.
        """
        if (kind := job.accelerator_type) is not None:
            of_type = self.cluster.of_type(kind)
            # Both counts, as in `free`.
            left = min(
                of_type.total.gpus - self._gpus[kind],
                of_type.free.gpus + freed_of_type - self._gpus_not_placed[kind],
            )
            # Without a node of this type, an autoscaler adds one for the job.
            if self.cluster.has_type(kind) and job.min_resources.gpus > left:
                return False
        return job.min_resources.fits(self.free(freed))


def _next(order: _Order, usage: _Usage, policy: Policy, found: Plan) -> SchedulableJob | None:
    """Return the first job that may start, and set the reasons of those before it.

    Also adds the jobs that the first one to wait for resources preempts; no job may start then.
    """
    reasons, now = found.reasons, order.now
    is_full = len(usage.jobs) >= policy.max_active
    is_first = True
    kept: str | None = None
    quota_kept_for: dict[str, SchedulableJob] = {}

    def is_behind(job: SchedulableJob) -> bool:
        first = quota_kept_for.get(job.owner)
        return first is not None and now - first.queued_at >= policy.backfill

    def has_quota(job: SchedulableJob) -> bool:
        owners = usage.held(job.owner) + job.max_resources
        return policy.quota_of(job.owner).allows(usage.count(job.owner) + 1, owners)

    for job in order.jobs(usage):
        # Quotas come before resources: a job without quota must not reserve resources for itself.
        if is_behind(job):
            first = quota_kept_for[job.owner].id
            reasons[job.id] = f"waits behind {first}, which has waited longer for the quota of {job.owner}"
        elif not has_quota(job):
            reasons[job.id] = f"waits for the quota of {job.owner}"
            quota_kept_for.setdefault(job.owner, job)
        elif kept is not None and job.id not in order.preemptors:
            reasons[job.id] = kept
        elif is_full or not usage.has_room(job):
            what = f"one of {policy.max_active} active jobs to end" if is_full else str(job.min_resources)
            reasons[job.id] = f"waits for {what}"
            # Only the first job reserves and preempts; otherwise a long queue would block all backfill.
            if is_first:
                is_first, victims = False, _victims(job, usage, policy)
                found.preempted.update(dict.fromkeys(victims, job.id))
                preemptors = [job] if victims else order.waiting_preemptors()
                if now - job.queued_at >= policy.backfill:
                    kept = f"waits behind {job.id}, which has waited longer for {job.min_resources}"
                # One that waits for its quota cannot use what is kept for it.
                elif one := next((one for one in preemptors if has_quota(one) and not is_behind(one)), None):
                    kept = f"waits behind {one.id}, which preempts others for {one.min_resources}"
        else:
            return job
    return None


def _victims(job: SchedulableJob, usage: _Usage, policy: Policy) -> list[str]:
    """Return the ids of the jobs that `job` preempts; none if it need not or cannot."""
    if job.preempted_by is not None:
        return []
    running, cluster = usage.jobs, usage.cluster
    kind = job.accelerator_type

    def gpus_of_type(jobs: Iterable[SchedulableJob]) -> float:
        return sum(
            one.max_resources.gpus
            for one in jobs
            if kind is not None and cluster.gives_type(kind, one.accelerator_type)
        )

    stopping = [one.id for one in running if one.is_stopping]
    # By our count alone: Ray reports resources of jobs that have just ended as used for some seconds.
    holding = [one for one in running if not one.is_stopping]
    held, total = sum((one.max_resources for one in holding), NO_RESOURCES), cluster.total
    if kind is not None:
        total, held = cluster.of_type(kind).total, Resources(held.cpus, gpus_of_type(holding))
    has_slot = len(running) - len(stopping) < policy.max_active
    if has_slot and job.min_resources.fits(total - held):
        return []

    def fits_without(gone: Sequence[str]) -> bool:
        left = [one for one in running if one.id not in gone]
        # At their maximum, as our count has them. If an elastic job holds less, the next plan takes more.
        ending = [one for one in running if one.id in gone and one.has_workers]
        freed = sum((one.max_resources for one in ending), NO_RESOURCES)
        has_room = _Usage(left, cluster).has_room(job, freed, gpus_of_type(ending))
        return len(left) < policy.max_active and has_room

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


def _gpus_of_type(job: SchedulableJob, cluster: Cluster, policy: Policy) -> float:
    """Return the number of GPUs of a job's type; infinite if more may be added."""
    if job.accelerator_type is None or policy.autoscaled.gpus:
        return math.inf
    return cluster.of_type(job.accelerator_type).total.gpus
