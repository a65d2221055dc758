import math

import pytest

from tests.dist import run_on_ranks
from tests.trainer.factories import here, make_spec, run_here
from trainer.probes.sync_cost import StepTimer, sync_cost


def cost_here():
    return sync_cost([100, 100], 0.5 + here().rank, here())


def measured_here(spec):
    return run_here(spec)[1].probes


@pytest.mark.dist
def test_the_cost_is_the_maximum_over_workers():
    first, second = run_on_ranks(cost_here, 2)
    assert first == second
    assert first["step_seconds"] == 1.5
    assert 1e-6 < first["sync_seconds"] < 5


def test_one_worker_has_next_to_no_cost():
    assert cost_here()["sync_seconds"] < 0.01


def test_the_time_of_a_step_is_a_median():
    timer = StepTimer()
    assert math.isnan(timer.seconds)
    for _ in range(3):
        timer.begin()
        timer.end()
    assert 0 < timer.seconds < 1


@pytest.mark.dist
def test_a_run_logs_cost_and_values_per_channel():
    """50 samples over 3 workers in two parts: the smallest share has 8."""
    spec = make_spec(
        num_workers=3,
        gradient_accumulation_steps=2,
        steps=3,
        probes={"measure": ["sync_cost"], "every": 2},
    )
    measured = run_on_ranks(measured_here, 3, spec)
    assert measured[0] == measured[1] == measured[2]
    first, last = measured[0][0], measured[0][2]
    assert first["probe/norm1/values_per_channel"] == 8
    assert "probe/step_seconds" not in first  # no step has ended
    assert last["probe/step_seconds"] > 0
    assert last["probe/sync_seconds"] > 0
