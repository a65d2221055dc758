import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.statistics import compare, default_target, mean_interval, steps_to_target

SLOW = {0: [(0, 0.1), (1000, 0.7), (2000, 0.85)], 1: [(0, 0.1), (1000, 0.75), (2000, 0.9)]}
SLOW |= {2: [(0, 0.1), (1000, 0.75), (2000, 0.875)]}
FAST = {0: [(0, 0.1), (100, 0.82), (2000, 0.9)], 1: [(0, 0.1), (100, 0.5), (200, 0.8)]}
FAST |= {2: [(0, 0.1), (125, 0.81), (2000, 0.9)]}


def test_steps_to_target_is_the_first_step_at_or_above_it():
    assert steps_to_target(FAST[1], 0.8) == 200
    assert steps_to_target(SLOW[0], 0.9) is None


def test_ratios_are_taken_seed_by_seed():
    result = compare(FAST, SLOW, 0.8, is_baseline=False)
    assert result.ratio is not None
    assert (result.ratio.low, result.ratio.median, result.ratio.high) == (10, 16, 20)
    assert result.steps_to_target is not None
    assert result.steps_to_target.median == 125
    assert result.best is not None
    assert result.best.high == 0.9
    assert result.final is not None
    assert result.final.low == 0.8
    assert result.verdict == "faster"
    assert compare(SLOW, FAST, 0.8, is_baseline=False).verdict == "slower"


def test_a_baseline_that_never_gets_there_gives_a_lower_bound():
    never = {seed: [(0, 0.1), (2000, 0.2)] for seed in range(3)}
    result = compare(FAST, never, 0.8, is_baseline=False)
    assert result.ratio_is_at_least
    assert result.ratio is not None
    assert result.ratio.low == 10
    assert result.verdict == "faster"
    assert compare(never, FAST, 0.8, is_baseline=False).verdict == "target not reached"


def test_seeds_that_disagree_show_no_clear_difference():
    mixed = FAST | {1: [(0, 0.1), (4000, 0.9)]}
    assert compare(mixed, SLOW, 0.8, is_baseline=False).verdict == "no clear difference"


def test_one_seed_of_many_decides_no_report():
    slow = dict.fromkeys(range(12), SLOW[0])
    fast = {seed: FAST[seed % 3] for seed in range(11)} | {11: [(0, 0.1), (2500, 0.9)]}
    assert compare(fast, slow, 0.8, is_baseline=False).verdict == "faster"
    assert compare(slow, fast, 0.8, is_baseline=False).verdict == "slower"


def test_three_seeds_that_agree_by_chance_are_no_faster():
    """Ratios of 1.05, 1.1 and 3: all above 1, their interval is 0.35 to 6.6."""
    runs = {seed: [(0, 0.1), (round(2000 / ratio), 0.9)] for seed, ratio in enumerate((1.05, 1.1, 3))}
    assert compare(runs, SLOW, 0.8, is_baseline=False).verdict == "no clear difference"


def test_two_seeds_are_too_few_for_a_verdict():
    runs = {seed: FAST[seed] for seed in (0, 1)}
    assert compare(runs, SLOW, 0.8, is_baseline=False).verdict == "no clear difference"


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
    slow |= {2: [(0, 2.3), (2000, 0.45)]}
    fast = {0: [(0, 2.3), (100, 0.4), (2000, 0.6)], 1: [(0, 2.3), (100, 0.5), (200, 0.3)]}
    fast |= {2: fast[0]}
    assert steps_to_target(slow[0], 0.5, "min") == 2000
    assert default_target(slow, "min") == pytest.approx(0.45)
    result = compare(fast, slow, 0.5, is_baseline=False, direction="min")
    assert (result.best.low, result.best.high) == (0.3, 0.4)
    assert (result.ratio.low, result.ratio.high) == (20, 20)
    assert result.verdict == "faster"
    assert compare(slow, fast, 0.5, is_baseline=False, direction="min").verdict == "slower"


NUMBERS = st.floats(-1e6, 1e6)


def known(numbers):
    return [(number, number) for number in numbers]


def test_a_mean_has_a_t_interval():
    """1, 2 and 3: s = 1, and t = 4.3027 for two degrees of freedom (any table)."""
    half = 4.30265 / math.sqrt(3)
    assert mean_interval(known([1, 2, 3])) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    factor = 10**half
    assert mean_interval(known([10, 100, 1000]), is_ratio=True) == pytest.approx((100 / factor, 100 * factor), rel=1e-5)


@pytest.mark.parametrize("n", [3, 6, 20])
def test_an_interval_contains_the_mean_of_all_seeds_as_often_as_it_says_whatever_their_number(n):
    """2,000 experiments: 95 % within four standard errors (2 %). The range of three seeds contains it in 75 %."""
    experiments = np.random.default_rng(n).normal(size=(2000, n))
    intervals = [mean_interval(known(numbers)) for numbers in experiments.tolist()]
    assert abs(sum(low <= 0 <= high for low, high in intervals) / 2000 - 0.95) < 0.02


@given(st.lists(NUMBERS, min_size=3, max_size=20), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_an_interval_lies_around_the_mean_whatever_the_order_of_seeds(numbers, random):
    low, high = mean_interval(known(numbers))
    mean = fmean(numbers)
    assert low <= mean + 1e-6
    assert high >= mean - 1e-6
    assert (mean - low) == pytest.approx(high - mean, abs=1e-6)
    shuffled = random.sample(numbers, len(numbers))
    assert mean_interval(known(shuffled)) == pytest.approx((low, high), abs=1e-6)


def test_equal_numbers_have_an_interval_of_no_width_at_exactly_that_number():
    assert mean_interval(known([0.1] * 3)) == (0.1, 0.1)
    assert mean_interval(known([5.0] * 3), is_ratio=True) == (5.0, 5.0)
    assert mean_interval(known([math.inf] * 3)) == (math.inf, math.inf)


def test_a_ratio_and_its_inverse_have_inverse_intervals():
    low, high = mean_interval(known([2, 3, 5]), is_ratio=True)
    assert mean_interval(known([1 / 2, 1 / 3, 1 / 5]), is_ratio=True) == pytest.approx((1 / high, 1 / low))


def test_what_is_not_known_leaves_an_end_open():
    low, high = mean_interval(known([1, 2, 3]))
    assert mean_interval([(1, 1), (2, 2), (3, math.inf)]) == (low, math.inf)
    assert mean_interval([(-math.inf, 1), (2, 2), (3, 3)]) == (-math.inf, high)
    assert mean_interval([(0, math.inf)] * 3, is_ratio=True) == (0, math.inf)
    assert mean_interval(known([0, 2, 3]), is_ratio=True) == (0, math.inf)
    assert mean_interval(known([1e-300, 1, 1e300]), is_ratio=True) == (0, math.inf)


@pytest.mark.parametrize("bounds", [[], [(1, 1)] * 2, [(1, 1), (2, 2), (math.nan, 3)]])
def test_too_few_seeds_have_no_interval(bounds):
    assert mean_interval(bounds) is None


def test_negative_ratios_have_no_interval():
    assert mean_interval(known([1, 2, -1]), is_ratio=True) is None
