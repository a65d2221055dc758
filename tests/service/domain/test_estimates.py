from dataclasses import replace

import pytest

from service.domain.estimates import estimate_seconds
from tests.service.examples import make_job
from trainer.jobspec import JobSpec, Progress

SPEC = JobSpec(steps=1_000, global_batch_size=50)


def ended(speed, ran_seconds, **changes):
    progress = Progress(step=100, total_steps=100, samples_per_second=speed, eta_seconds=0)
    spec = SPEC.model_copy(update={"steps": 100, **changes})
    return make_job(spec=spec, progress=progress, ran_seconds=ran_seconds)


def test_an_estimate_is_the_start_and_the_samples_of_the_run():
    # 100 steps of 50 samples at 500 per second take 10 seconds, so 3 are the start.
    assert estimate_seconds(SPEC, [ended(500, 13)]) == pytest.approx(3 + 50_000 / 500)


def test_the_median_of_similar_jobs_counts():
    jobs = [ended(500, 13), ended(1_000, 8), ended(50, 200)]
    assert estimate_seconds(SPEC, jobs) == pytest.approx(3 + 50_000 / 500)


def test_jobs_of_the_same_norm_count_alone_if_there_are_any():
    none = ended(5_000, 2, norm="none")
    assert estimate_seconds(SPEC, [none]) == pytest.approx(1 + 10)
    assert estimate_seconds(SPEC, [none, ended(500, 13)]) == pytest.approx(103)


@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"precision": "bf16"}])
def test_other_jobs_give_no_estimate(changes):
    assert estimate_seconds(SPEC, [ended(500, 13, **changes)]) is None


def test_jobs_without_a_measured_speed_give_no_estimate():
    assert estimate_seconds(SPEC, [replace(ended(500, 13), progress=None), ended(0, 13)]) is None
