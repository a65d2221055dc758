import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.effects import RunData, effect_of, measure, seconds_per_step
from service.domain.statistics import Interval, Spread
from tests.service.domain.comparison_runs import FAST, SLOW


def data(curves, **options):
    return {seed: RunData(metric=curve, **options) for seed, curve in curves.items()}


def effect(name="steps_to_target", runs=FAST, reference=SLOW, target=0.8, direction="max", **options):
    return effect_of(name, data(runs, **options), data(reference, **options), target, direction)


def test_ratios_are_paired_by_seed_and_are_above_1_for_fewer_steps():
    found = effect()
    assert found.spread == Spread(low=10, median=16, high=20)
    assert found.estimate.low == found.estimate.high == pytest.approx((20 * 10 * 16) ** (1 / 3))
    assert (found.outcome, found.seeds, found.p_value) == ("better", 3, 0.25)
    inverse = effect(runs=SLOW, reference=FAST)
    assert inverse.outcome == "worse"
    assert inverse.interval.low == pytest.approx(1 / found.interval.high)


def test_a_reference_that_misses_the_target_gives_a_lower_bound():
    never = {seed: [(0, 0.1), (2000, 0.2)] for seed in range(3)}
    found = effect(reference=never)
    assert found.is_at_least
    assert found.spread.low == 10
    assert (found.estimate.high, found.interval.high, found.p_value) == (math.inf, math.inf, None)
    assert found.outcome == "better"
    inverse = effect(runs=never, reference=FAST)
    assert inverse.outcome == "worse"
    assert inverse.estimate == Interval(0.0, pytest.approx(1 / found.estimate.low))
    assert inverse.spread is None


def test_seeds_that_disagree_cannot_decide():
    found = effect(runs=FAST | {1: [(0, 0.1), (4000, 0.9)]})
    assert (found.outcome, found.more_seeds is not None) == ("cannot tell", True)


def test_three_seeds_that_agree_by_chance_are_not_better():
    """Ratios 1.05, 1.1 and 3: all above 1, with the interval 0.35 to 6.6."""
    runs = {seed: [(0, 0.1), (round(2000 / ratio), 0.9)] for seed, ratio in enumerate((1.05, 1.1, 3))}
    assert effect(runs=runs).outcome == "cannot tell"


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_cannot_decide(seeds):
    found = effect(runs={seed: FAST[seed] for seed in range(seeds)})
    assert (found.outcome, found.interval) == ("cannot tell", None)
    assert found.seeds + found.more_seeds == 3


def test_one_seed_of_many_does_not_decide():
    slow = dict.fromkeys(range(12), SLOW[0])
    fast = {seed: FAST[seed % 3] for seed in range(11)} | {11: [(0, 0.1), (2500, 0.9)]}
    assert effect(runs=fast, reference=slow).outcome == "better"
    assert effect(runs=slow, reference=fast).outcome == "worse"


def test_less_is_better_for_losses():
    high = {seed: [(0, 2.3), (1000, 0.7 + seed / 100)] for seed in range(3)}
    low = {seed: [(0, 2.3), (1000, 0.2 + seed / 90)] for seed in range(3)}
    for name in ("best", "final", "area"):
        assert effect(name, low, high, 0.5, "min").outcome == "better"
        assert effect(name, high, low, 0.5, "min").outcome == "worse"
    assert effect("final", low, high, 0.5, "max").outcome == "worse"
    assert effect("final", low, high, 0.5, "min").estimate.low == pytest.approx(-0.5, abs=0.01)


def test_samples_and_seconds_to_the_target():
    seconds = [(0, 1.0), (100, 3.0), (2000, 41.0)]
    run = RunData(metric=FAST[0], seconds=seconds, batch_size=32)
    assert measure("samples_to_target", run, 0.8, "max") == (3200, 3200)
    assert measure("seconds_to_target", run, 0.8, "max") == (3.0, 3.0)
    assert measure("seconds_to_target", run, 0.99, "max") == (41.0, math.inf)
    assert measure("seconds_per_step", run, None, "max") == (0.02, 0.02)
    assert measure("seconds_to_target", RunData(metric=FAST[0]), 0.8, "max") is None
    assert seconds_per_step([(5, 1.0)]) is None


def test_areas_are_compared_over_common_steps():
    """A run that is twice as long has the same area as far as both go."""
    short = {seed: [(0, 0.0), (100, 1.0)] for seed in range(3)}
    long = {seed: [(0, 0.0), (100, 1.0), (1000, 1.0)] for seed in range(3)}
    assert effect("area", short, long).estimate == Interval(0.0, 0.0)


def test_the_final_value_of_a_diverged_run_is_the_worst():
    run = RunData(metric=FAST[0], diverged=True)
    assert measure("final", run, 0.8, "max") == (-math.inf, -math.inf)
    assert measure("final", run, 0.8, "min") == (math.inf, math.inf)
    assert measure("best", run, 0.8, "max") == (0.9, 0.9)


def test_without_common_seeds_there_is_no_effect():
    assert effect(runs={7: FAST[0]}) is None
    assert effect(runs={0: []}) is None
    assert effect(target=None) is None


@given(st.lists(st.tuples(st.integers(1, 9_999), st.integers(1, 9_999)), min_size=3, max_size=8))
def test_better_and_worse_exchange_with_the_variants(pairs):
    ours = {seed: [(0, 0.0), (a, 1.0)] for seed, (a, _) in enumerate(pairs)}
    theirs = {seed: [(0, 0.0), (b, 1.0)] for seed, (_, b) in enumerate(pairs)}
    there, back = effect(runs=ours, reference=theirs), effect(runs=theirs, reference=ours)
    assert {there.outcome, back.outcome} in ({"better", "worse"}, {"cannot tell"})
    assert there.estimate.low == pytest.approx(1 / back.estimate.low)
    assert there.p_value == pytest.approx(back.p_value)
