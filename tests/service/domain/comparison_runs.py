"""Runs and reports of comparisons with given curves."""

from service.domain.jobs import JobState
from service.domain.reports import make_report
from service.domain.variants import Run
from tests.service.examples import make_comparison, make_job, summary_of
from trainer.jobspec import JobSpec

SLOW = {0: [(0, 0.1), (1800, 0.7), (2000, 0.85)], 1: [(0, 0.1), (1800, 0.75), (2000, 0.9)]}
SLOW |= {2: [(0, 0.1), (1800, 0.75), (2000, 0.875)]}
FAST = {0: [(0, 0.1), (90, 0.6), (100, 0.82), (2000, 0.9)], 1: [(0, 0.1), (180, 0.5), (200, 0.8)]}
FAST |= {2: [(0, 0.1), (110, 0.6), (125, 0.81), (2000, 0.9)]}


def make_run(
    variant, seed, metric, state=JobState.SUCCEEDED, failure_kind=None, seconds=(), spec=None, **changes
):
    """Make a run of one variant and seed."""
    spec = spec or JobSpec(steps=2_000, num_workers=1, seed=seed)
    job = make_job(
        spec=spec, variant=variant | {"seed": seed}, state=state, failure_kind=failure_kind, **changes
    )
    return Run(job=summary_of(job), spec=spec, metric=metric, seconds=seconds)


def report_of(*variants, target=0.8, metric="accuracy", baseline=None):
    """Return the report of lists of runs, one per variant; the first is the baseline."""
    runs = [run for variant in variants for run in variant]
    first = {path: value for path, value in runs[0].job.variant.items() if path != "seed"}
    comparison = make_comparison(target=target, metric=metric, baseline=baseline or first)
    return make_report(
        comparison,
        [run.job for run in runs],
        [run.spec for run in runs],
        {run.job.id: run.metric for run in runs},
        {run.job.id: run.seconds for run in runs},
    )


def make_runs(norm, curves, **changes):
    """Make a run per seed of `curves`."""
    return [make_run({"norm": norm}, seed, curve, **changes) for seed, curve in curves.items()]
