import math
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.statistics import bootstrap_median, compare, default_target, steps_to_target

SLOW = {0: [(0, 0.1), (1000, 0.7), (2000, 0.85)], 1: [(0, 0.1), (1000, 0.75), (2000, 0.9)]}
FAST = {0: [(0, 0.1), (100, 0.82), (2000, 0.9)], 1: [(0, 0.1), (100, 0.5), (200, 0.8)]}


def test_steps_to_target_is_the_first_step_at_or_above_it():
    assert steps_to_target(FAST[1], 0.8) == 200
    assert steps_to_target(SLOW[0], 0.9) is None


def test_ratios_are_taken_seed_by_seed():
    result = compare(FAST, SLOW, 0.8, is_baseline=False)
    assert result.ratio is not None
    assert (result.ratio.low, result.ratio.median, result.ratio.high) == (10, 15, 20)
    assert result.steps_to_target is not None
    assert result.steps_to_target.median == 150
    assert result.best is not None
    assert result.best.high == 0.9
    assert result.final is not None
    assert result.final.low == 0.8
    assert result.verdict == "faster"
    assert compare(SLOW, FAST, 0.8, is_baseline=False).verdict == "slower"


def test_a_baseline_that_never_gets_there_gives_a_lower_bound():
    never = {0: [(0, 0.1), (2000, 0.2)], 1: [(0, 0.1), (2000, 0.3)]}
    result = compare(FAST, never, 0.8, is_baseline=False)
    assert result.ratio_is_at_least
    assert result.ratio is not None
    assert result.ratio.low == 10
    assert result.verdict == "faster"
    assert compare(never, FAST, 0.8, is_baseline=False).verdict == "target not reached"


def test_seeds_that_disagree_show_no_clear_difference():
    mixed = {0: FAST[0], 1: [(0, 0.1), (4000, 0.9)]}
    assert compare(mixed, SLOW, 0.8, is_baseline=False).verdict == "no clear difference"


@pytest.mark.parametrize("runs", [{}, {0: []}])
def test_without_data_nothing_is_claimed(runs):
    result = compare(runs, SLOW, 0.8, is_baseline=False)
    assert (result.n, result.ratio, result.best, result.verdict) == (0, None, None, "target not reached")


def test_a_missing_baseline_gives_no_verdict():
    assert compare(FAST, {}, 0.8, is_baseline=False).verdict == "baseline without data"
    assert compare(FAST, {}, 0.8, is_baseline=False, unfinished=1).verdict == "not finished"


def test_one_seed_and_failed_runs_are_said_to_be_so():
    assert compare({0: FAST[0]}, SLOW, 0.8, is_baseline=False).verdict == "faster on one seed"
    assert compare({0: SLOW[0]}, FAST, 0.8, is_baseline=False).verdict == "slower on one seed"
    result = compare(FAST, SLOW, 0.8, is_baseline=False, failed=1)
    assert (result.failed, result.verdict) == (1, "runs failed")
    assert compare({}, SLOW, 0.8, is_baseline=False, unfinished=2).verdict == "not finished"


def test_the_default_target_is_the_baselines_best():
    assert default_target(SLOW) == pytest.approx(0.875)
    assert default_target({0: []}) is None
    assert compare(SLOW, SLOW, default_target(SLOW), is_baseline=True).verdict == "baseline"


def test_of_a_loss_the_smallest_value_is_the_best():
    slow = {0: [(0, 2.3), (1000, 0.7), (2000, 0.4)], 1: [(0, 2.3), (1000, 0.6), (2000, 0.5)]}
    fast = {0: [(0, 2.3), (100, 0.4), (2000, 0.6)], 1: [(0, 2.3), (100, 0.5), (200, 0.3)]}
    assert steps_to_target(slow[0], 0.5, "min") == 2000
    assert default_target(slow, "min") == pytest.approx(0.45)
    result = compare(fast, slow, 0.5, is_baseline=False, direction="min")
    assert (result.best.low, result.best.high) == (0.3, 0.4)
    assert (result.ratio.low, result.ratio.high) == (20, 20)
    assert result.verdict == "faster"
    assert compare(slow, fast, 0.5, is_baseline=False, direction="min").verdict == "slower"


NUMBERS = st.floats(-1e6, 1e6)


@given(st.lists(NUMBERS, min_size=3, max_size=20), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_a_bootstrap_interval_lies_in_the_range_around_the_median_whatever_the_order_of_seeds(numbers, random):
    low, high = bootstrap_median([(number, number) for number in numbers])
    assert min(numbers) <= low <= median(numbers) <= high <= max(numbers)
    if len(numbers) <= 5:
        assert (low, high) == (min(numbers), max(numbers))
    shuffled = random.sample(numbers, len(numbers))
    assert bootstrap_median([(number, number) for number in shuffled]) == (low, high)


@given(st.lists(st.tuples(NUMBERS, st.floats(0, math.inf)), min_size=3, max_size=12))
@settings(max_examples=30, deadline=None)
def test_what_is_not_known_widens_a_bootstrap_interval(pairs):
    known = bootstrap_median([(number, number) for number, _ in pairs])
    below = bootstrap_median([(number - width, number) for number, width in pairs])
    above = bootstrap_median([(number, number + width) for number, width in pairs])
    assert (below[0] <= known[0], above[1] >= known[1]) == (True, True)
    assert bootstrap_median([(-math.inf, math.inf) for _ in pairs]) == (-math.inf, math.inf)


def test_a_bootstrap_interval_contains_the_median_of_all_seeds_as_often_as_it_says():
    """100 experiments of 20 seeds: 95 % within three standard errors (6.5 %)."""
    random = np.random.default_rng(0)
    intervals = [bootstrap_median([(number, number) for number in random.normal(size=20)]) for _ in range(100)]
    assert abs(sum(low <= 0 <= high for low, high in intervals) / 100 - 0.95) < 0.065


@pytest.mark.parametrize("bounds", [[], [(1, 1)] * 2, [(1, 1), (2, 2), (math.nan, 3)]])
def test_too_few_seeds_have_no_interval(bounds):
    assert bootstrap_median(bounds) is None
