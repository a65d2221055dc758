from hypothesis import given
from hypothesis import strategies as st

from service.domain.scheduling import Capacity, needs, next_job
from tests.service.examples import make_job
from trainer.spec import JobSpec

workers = st.integers(1, 12)


def job(num_workers, **changes):
    return make_job(spec=JobSpec(steps=1, num_workers=num_workers), **changes)


@given(st.lists(workers, max_size=8), st.lists(workers, max_size=8), st.integers(0, 24), st.integers(1, 6))
def test_never_more_than_the_cluster_has(queued, active, cpus, most_active):
    running = [job(n) for n in active]
    chosen = next_job([job(n) for n in queued], running, Capacity(cpus, 0), most_active)
    if chosen is not None:
        assert sum(needs(other.spec).cpus for other in [*running, chosen]) <= cpus
        assert len(running) < most_active


@given(st.lists(workers, min_size=1, max_size=8), st.integers(1, 12))
def test_the_oldest_that_the_cluster_can_ever_run_goes_first(queued, cpus):
    jobs = [job(n) for n in queued]
    possible = [candidate for candidate in jobs if candidate.spec.num_workers <= cpus]
    assert next_job(jobs, [], Capacity(cpus, 0), 1) == (possible[0] if possible else None)


def test_a_waiting_job_holds_back_younger_ones():
    assert next_job([job(2), job(1)], [job(1)], Capacity(2, 0), 8) is None


def test_a_job_too_large_for_the_cluster_holds_back_nobody():
    small = job(1)
    assert next_job([job(50), small], [], Capacity(2, 0), 8) == small


def test_gpus_are_counted():
    on_gpu = make_job(spec=JobSpec(steps=1, num_workers=2, use_gpu=True))
    assert next_job([on_gpu], [], Capacity(8, 1), 8) is None
    assert next_job([on_gpu], [], Capacity(8, 2), 8) == on_gpu


def test_an_elastic_job_starts_with_its_least_and_is_counted_with_its_most():
    elastic = job([2, 4])
    assert next_job([elastic], [], Capacity(2, 0), 8) == elastic
    assert next_job([job(1)], [elastic], Capacity(4, 0), 8) is None
    assert next_job([job(1)], [elastic], Capacity(5, 0), 8) is not None
