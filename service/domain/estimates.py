"""Estimated run times of jobs, from the throughput of similar ones."""

from collections.abc import Sequence
from statistics import median

from service.domain.jobs import Job
from trainer.jobspec import JobSpec

SIMILAR_FIELDS = ("model", "data", "num_workers", "use_gpu", "precision", "parallel", "compile")
"""Fields of a spec that decide on its throughput, besides the norm."""


def estimate_seconds(spec: JobSpec, ended: Sequence[Job]) -> float | None:
    """Return the median run time that succeeded jobs suggest; None if none is similar.

    A run is its start and its samples. Jobs of the same norm count alone, if there are any.
    """
    similar = [job for job in ended if _is_similar(spec, job.spec)]
    similar = [job for job in similar if job.spec.norm == spec.norm] or similar
    measured = [(job, speed) for job in similar if (speed := _speed(job)) > 0]
    if not measured:
        return None
    starts = [max(0.0, job.ran_seconds - _samples(job.spec) / speed) for job, speed in measured]
    return median(starts) + _samples(spec) / median(speed for _, speed in measured)


def _is_similar(spec: JobSpec, other: JobSpec) -> bool:
    return all(getattr(spec, name) == getattr(other, name) for name in SIMILAR_FIELDS)


def _speed(job: Job) -> float:
    return job.progress.samples_per_second if job.progress else 0.0


def _samples(spec: JobSpec) -> int:
    return spec.steps * spec.global_batch_size
