import math
import sys
from itertools import product
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from service.domain.statistics import (
    Interval,
    area,
    default_target,
    finite_points,
    mean_interval,
    more_seeds,
    permutation_p_value,
    spread,
    steps_to_target,
    up_to,
    value_at,
)

CURVE = [(0, 0.1), (100, 0.5), (200, 0.8)]


def test_steps_to_target_is_the_first_step_at_or_above_it():
    assert steps_to_target(CURVE, 0.8) == 200
    assert steps_to_target(CURVE, 0.9) is None
    assert steps_to_target([(0, 2.3), (50, 0.4)], 0.5, "min") == 50


def test_the_default_target_is_reached_by_every_run_of_the_baseline():
    runs = {0: [(0, 0.1), (9, 0.7)], 1: [(0, 0.9), (9, 0.2)], 2: CURVE}
    assert default_target(runs) == 0.7
    assert default_target(runs, "min") == 0.2
    assert default_target({0: [(0, 0.7), (9, math.inf)]}) == 0.7
    assert default_target({0: []}) is None


def test_values_between_points_are_interpolated():
    assert value_at(CURVE, 150) == pytest.approx(0.65)
    assert value_at(CURVE, 200) == 0.8
    assert value_at(CURVE, 201) is None
    assert value_at([], 0) is None


def test_an_area_is_the_mean_over_steps():
    assert area(CURVE, 200) == pytest.approx((0.3 + 0.65) / 2)
    assert area(CURVE, 50) == pytest.approx(0.2)
    assert area(CURVE, 0) is None
    assert area(CURVE, 300) is None


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.integers(1, 1_000))
def test_the_area_of_evenly_spaced_points_is_that_of_numpy(values, spacing):
    curve = [(spacing * place, value) for place, value in enumerate(values)]
    expected = np.trapezoid(values, dx=spacing) / (spacing * (len(values) - 1))
    assert area(curve, curve[-1][0]) == pytest.approx(expected, abs=1e-9)


def test_points_that_are_not_finite_are_left_out():
    assert finite_points([(0, 1.0), (1, math.inf), (2, math.nan), (3, -math.inf), (4, 2.0)]) == [
        (0, 1.0),
        (4, 2.0),
    ]
    assert up_to(CURVE, 150) == CURVE[:2]
    assert up_to(CURVE, None) == CURVE


NUMBERS = st.floats(-1e6, 1e6)


def known(numbers):
    return [(number, number) for number in numbers]


def ends(numbers, **options):
    interval = mean_interval(known(numbers), **options)
    return interval.low, interval.high


def test_a_mean_of_three_seeds_has_a_t_interval():
    """1, 2 and 3: s = 1, and t = 4.3027 for two degrees of freedom (any table)."""
    half = 4.30265 / math.sqrt(3)
    assert ends([1, 2, 3]) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    factor = 10**half
    assert ends([10, 100, 1000], is_ratio=True) == pytest.approx((100 / factor, 100 * factor), rel=1e-5)


@pytest.mark.parametrize("n", [3, 6, 20])
def test_intervals_have_their_nominal_coverage_for_any_number_of_seeds(n):
    """At least 95 % within four standard errors, and not 100 %.

    The range of three seeds contains the mean in 75 %, and so at most does every bootstrap interval.
    """
    count = 1_000 if n <= 4 else 300
    experiments = np.random.default_rng(n).normal(size=(count, n))
    inside = sum(0 in mean_interval(known(numbers)) for numbers in experiments.tolist()) / count
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / count) < inside < 0.99


@given(st.lists(NUMBERS, min_size=3, max_size=20), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_an_interval_is_independent_of_the_order_of_seeds(numbers, random):
    low, high = ends(numbers)
    assert low <= fmean(numbers) + 1e-6
    assert high >= fmean(numbers) - 1e-6
    shuffled = random.sample(numbers, len(numbers))
    assert ends(shuffled) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    "numbers",
    [
        [0.0, 0.0, 0.0, 0.0, 1.1e-169],
        [0.0, 0.0, 0.0, 0.0, 5e-324],
        [1.0, 1.0, 1.0, 1.0, 1 + 2**-52],
        [1e16, 1e16, 1e16, 1e16, 1e16 + 2],
        [0.0, 1e-5, 0.0, 1e-5, 1e200],
        [1.1e308, 1.2e308, 1.3e308, 1.4e308, 1.7e308],
        [-1e-310, 0.0, 0.0, 0.0, 1e-310],
    ],
)
def test_numbers_near_the_limits_of_floats_have_finite_statistics(numbers):
    low, high = ends(numbers)
    assert -math.inf < low <= numbers[-1]
    assert numbers[0] <= high < math.inf
    assert 0 < permutation_p_value(numbers) <= 1
    more_seeds(numbers)
    curve = list(enumerate(numbers))
    assert numbers[0] <= area(curve, len(numbers) - 1) <= numbers[-1]


LARGEST = sys.float_info.max


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=8))
@example([LARGEST, LARGEST, -LARGEST, -LARGEST, -LARGEST])
@example([LARGEST, -LARGEST, LARGEST])
@example([LARGEST, LARGEST, LARGEST, LARGEST])
@example([7e156, 9e-158, 9e-158])
@example([5e-324, 5e-324, 1e-323, LARGEST])
@settings(max_examples=100)
def test_no_finite_numbers_overflow(numbers):
    low, high = ends(numbers)
    assert low <= high
    assert 0 < permutation_p_value(numbers) <= 1
    more_seeds(numbers)
    curve = list(enumerate(numbers))
    assert math.isfinite(area(curve, len(numbers) - 1))
    assert math.isfinite(value_at([(0, min(numbers)), (7, max(numbers))], 3))
    middle = spread(numbers)
    assert middle.low <= middle.median <= middle.high


@given(NUMBERS, st.lists(st.integers(1, 1_000), min_size=2, max_size=9, unique=True))
def test_a_constant_curve_has_its_value_on_every_grid(number, steps):
    curve = [(step, number) for step in sorted(steps)]
    assert value_at(curve, (curve[0][0] + curve[-1][0]) // 2) == number
    assert area(curve, curve[-1][0]) == number


@given(st.lists(NUMBERS, min_size=3, max_size=12))
@settings(max_examples=30)
def test_an_interval_is_never_narrower_than_students(numbers):
    from scipy.stats import t

    low, high = ends(numbers)
    half = t.ppf(0.975, len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers))
    assert low <= fmean(numbers) - half + 1e-6
    assert high >= fmean(numbers) + half - 1e-6


@given(st.lists(NUMBERS, min_size=3, max_size=4))
def test_the_interval_of_three_or_four_seeds_contains_their_range(numbers):
    low, high = ends(numbers)
    assert low <= min(numbers) + 1e-6
    assert high >= max(numbers) - 1e-6


def test_a_skewed_distribution_widens_the_interval_on_its_side():
    """Nine seeds at 1 and one at 11: Student's interval is symmetric, and the bootstrap's is not."""
    low, high = ends([1.0] * 9 + [11.0])
    assert high - 2 > 2 - low
    assert ends([-1.0] * 9 + [-11.0]) == (-high, -low)
    assert ends([1.0] * 9 + [11.0]) == (low, high)  # the seed of the resampling is fixed


def test_equal_numbers_have_an_interval_of_zero_width():
    assert ends([0.1] * 3) == (0.1, 0.1)
    assert ends([5.0] * 8, is_ratio=True) == (5.0, 5.0)
    assert ends([math.inf] * 3) == (math.inf, math.inf)


@pytest.mark.parametrize("numbers", [[2, 3, 5], [2, 3, 5, 7, 11, 13]])
def test_a_ratio_and_its_inverse_have_inverse_intervals(numbers):
    low, high = ends(numbers, is_ratio=True)
    assert ends([1 / number for number in numbers], is_ratio=True) == pytest.approx((1 / high, 1 / low))


def test_unknown_values_leave_an_interval_open():
    low, high = ends([1, 2, 3])
    assert mean_interval([(1, 1), (2, 2), (3, math.inf)]) == Interval(low, math.inf)
    assert mean_interval([(-math.inf, 1), (2, 2), (3, 3)]) == Interval(-math.inf, high)
    assert mean_interval([(0, math.inf)] * 3, is_ratio=True) == Interval(0, math.inf)
    assert mean_interval(known([0, 2, 3]), is_ratio=True) == Interval(0, math.inf)
    assert mean_interval(known([1e-300, 1, 1e300]), is_ratio=True) == Interval(0, math.inf)


@pytest.mark.parametrize("bounds", [[], [(1, 1)] * 2, [(1, 1), (2, 2), (math.nan, 3)]])
def test_too_few_seeds_have_no_interval(bounds):
    assert mean_interval(bounds) is None


def test_negative_ratios_have_no_interval():
    assert mean_interval(known([1, 2, -1]), is_ratio=True) is None


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8))
@settings(max_examples=40)
def test_a_permutation_test_enumerates_all_changes_of_signs(values):
    means = [
        abs(fmean(v * s for v, s in zip(values, signs, strict=True)))
        for signs in product((1, -1), repeat=len(values))
    ]
    expected = sum(mean >= abs(fmean(values)) - 1e-9 for mean in means) / len(means)
    assert permutation_p_value(values) == pytest.approx(expected)


def test_a_permutation_test_cannot_be_below_its_number_of_seeds():
    assert permutation_p_value([1.0, 2.0, 3.0]) == 0.25
    assert permutation_p_value([1.0] * 6) == 2 / 2**6
    assert permutation_p_value([1.0] * 40) < 0.001
    assert permutation_p_value([]) is None
    assert permutation_p_value([1.0, math.inf]) is None


def test_more_seeds_are_proposed_until_the_effect_would_be_found():
    assert more_seeds([]) == 3
    assert more_seeds([1.0]) == 2
    assert more_seeds([1.0, 1.1]) == 1
    assert more_seeds([1.0, -1.0, 0.0]) is None
    assert more_seeds([1.0, 1000.0, -999.0]) is None
    numbers = [0.0, 1.0, 2.0]
    proposed = len(numbers) + more_seeds(numbers)
    # Simulated with the observed mean and deviation of 1: the interval excludes 0 in about 80 %.
    experiments = np.random.default_rng(0).normal(1, 1, size=(400, proposed))
    found = sum(0 not in mean_interval(known(row)) for row in experiments.tolist()) / 400
    assert 0.7 < found < 0.9


@given(st.lists(NUMBERS, min_size=3, max_size=10))
@settings(max_examples=30)
def test_proposed_seeds_are_at_least_one(numbers):
    assume(0 in mean_interval(known(numbers)))
    assert (more_seeds(numbers) or 1) >= 1
