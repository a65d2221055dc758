"""Which queued job goes to Ray next; pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.domain.jobs import Job
from trainer.spec import JobSpec


@dataclass(frozen=True)
class Capacity:
    """What a cluster has in all."""

    cpus: float
    gpus: float


def needs(spec: JobSpec) -> Capacity:
    """Resources that a job needs to start: one CPU for each worker, and one GPU where asked for."""
    return _resources(spec, spec.min_workers)


def may_hold(spec: JobSpec) -> Capacity:
    """Resources that a job may hold while it runs: an elastic one takes what is free, up to its largest number of workers."""
    return _resources(spec, spec.max_workers)


def _resources(spec: JobSpec, workers: int) -> Capacity:
    return Capacity(cpus=workers, gpus=workers if spec.use_gpu else 0)


def fits(spec: JobSpec, capacity: Capacity) -> bool:
    """Whether a cluster of this size could ever run the job."""
    need = needs(spec)
    return need.cpus <= capacity.cpus and need.gpus <= capacity.gpus


def next_job(queued: Sequence[Job], active: Iterable[Job], capacity: Capacity, most_active: int) -> Job | None:
    """Choose the job to submit, or none: the oldest whose whole gang of workers fits what `active` leaves free.

    A job that waits for resources holds back younger ones, so that it cannot starve; one that is too large for this cluster
    does not.
    """
    running = list(active)
    if len(running) >= most_active:
        return None
    free = Capacity(
        cpus=capacity.cpus - sum(may_hold(job.spec).cpus for job in running),
        gpus=capacity.gpus - sum(may_hold(job.spec).gpus for job in running),
    )
    for job in queued:
        if fits(job.spec, free):
            return job
        if fits(job.spec, capacity):
            return None
    return None
