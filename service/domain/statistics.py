"""Statistics of curves and of paired seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, mean, median, median_high, median_low, stdev
from typing import Any, Literal

from trainer.jobspec import Direction, best_value, is_reached

Curve = Sequence[tuple[int, float]]
"""Pairs of step and value, in the order of steps."""
Bounds = tuple[float, float]
"""Lower and upper bound of a number; equal if the number is known."""

MIN_SEEDS = 3
"""Minimum number of seeds of an interval."""
CONFIDENCE = 0.95
POWER = 0.8
"""Probability with which the proposed number of seeds finds the observed effect."""
MAX_SEEDS = 100
"""Largest number of seeds that is proposed."""
RESAMPLES = 9_999
BOOTSTRAP_SEED = 0
MAX_EXACT_SEEDS = 16
"""Largest number of seeds whose sign changes are all enumerated."""
MAX_SEEDS_WITHIN_T = 4
"""Up to this number of seeds the t interval contains the range of the values.

No value is further from the mean than s · (n - 1) / √n, and half the t interval is s · t / √n with t = 4.30
and 3.18 for n = 3 and 4. So it contains all bootstrap intervals.
"""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range over seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Interval:
    """Interval whose bounds may be infinite."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Return whether a value is within the interval."""
        return self.low <= value <= self.high


def spread(values: Sequence[float]) -> Spread | None:
    """Return median and range of `values`, or None without values."""
    if not values:
        return None
    middle = median(values)
    if not math.isfinite(middle):  # the sum of the two middle values overflows, or they are infinite
        middle = median_low(values) / 2 + median_high(values) / 2
    return Spread(median=middle, low=min(values), high=max(values))


def finite_points(curve: Curve) -> list[tuple[int, float]]:
    """Return the points with finite values."""
    return [(step, value) for step, value in curve if math.isfinite(value)]


def up_to(curve: Curve, last_step: int | None) -> Curve:
    """Return the points up to a step; all of them if it is None."""
    return curve if last_step is None else [(step, value) for step, value in curve if step <= last_step]


def reaching_steps(curve: Curve, target: float, direction: Direction = "max") -> Bounds | None:
    """Return the last evaluation before the target and the first at it.

    The target was reached in between. Both are the same if the first evaluation is at the target. None if it
    was not reached.
    """
    before: int | None = None
    for step, value in curve:
        if is_reached(value, target, direction):
            return (step if before is None else before), step
        before = step
    return None


def steps_to_target(curve: Curve, target: float, direction: Direction = "max") -> int | None:
    """Return the first step at which the metric is `target` or better, or None."""
    return next((step for step, value in curve if is_reached(value, target, direction)), None)


def value_at(curve: Curve, step: int) -> float | None:
    """Return the value at a step, interpolated between points; None outside the curve."""
    before = next((point for point in reversed(curve) if point[0] <= step), None)
    after = next((point for point in curve if point[0] >= step), None)
    if before is None or after is None:
        return None
    if before[0] == after[0] or before[1] == after[1]:
        return before[1]
    share = (step - before[0]) / (after[0] - before[0])
    return 2 * (before[1] / 2 + share * (after[1] / 2 - before[1] / 2))  # halves do not overflow


def area(curve: Curve, last_step: int) -> float | None:
    """Return the mean over steps up to `last_step`.

    It is the area under the curve, by trapezoids, divided by its width. None for a curve that ends earlier or
    has no width.
    """
    end = value_at(curve, last_step)
    if end is None:
        return None
    points = [*(point for point in curve if point[0] < last_step), (last_step, end)]
    width = last_step - points[0][0]
    if width == 0:
        return None
    scaled, exponent = _scaled([value for _, value in points])
    # From the first value on, so that a constant curve has exactly its value on every grid.
    rises = [value - scaled[0] for value in scaled]
    sums = ((b[0] - a[0]) * (rises[i] + rises[i + 1]) / 2 for i, (a, b) in enumerate(pairwise(points)))
    return _unscaled(scaled[0] + math.fsum(sums) / width, exponent)


def best_of(curves: Iterable[Curve], direction: Direction) -> Spread | None:
    """Return median and range of the best values of non-empty curves."""
    return spread([best_value((value for _, value in curve), direction) for curve in curves if curve])


def default_target(baseline: Mapping[int, Curve], direction: Direction = "max") -> float | None:
    """Return the best value that every run of the baseline reached.

    Figure 3 of the paper uses the best value of a single run. With a median over seeds, half of the runs
    would not reach it, and their steps would be unknown. None without data.
    """
    best = best_of([finite_points(curve) for curve in baseline.values()], direction)
    if best is None:
        return None
    return best.low if direction == "max" else best.high


def mean_interval(bounds: Sequence[Bounds], *, is_ratio: bool = False) -> Interval | None:
    """Return the 95 % interval of the mean over paired seeds.

    It is the wider of two intervals, end by end: Student's t interval (n - 1 degrees of freedom), which
    assumes values that are approximately normal, and the bias-corrected and accelerated bootstrap interval
    (Efron 1987) with the small-sample expansion of Hesterberg 2015, which does not, but contains the mean too
    rarely for few seeds (`benchmarks/interval_coverage.py`). The seed of the resampling is fixed.

    For ratios it is the interval of the geometric mean, computed from logarithms, so a ratio and its inverse
    get the same verdict.

    Each seed has a lower and an upper bound, which are equal for a known number. The lower end is computed
    from the lower bounds, the upper end from the upper bounds; an infinite bound makes its end infinite.
    Returns None for fewer than `MIN_SEEDS`, a bound that is NaN, or a negative ratio.
    """
    ends = [end for pair in bounds for end in pair]
    if len(bounds) < MIN_SEEDS or any(math.isnan(end) or (is_ratio and end < 0) for end in ends):
        return None
    lows, highs = zip(*bounds, strict=True)
    return Interval(
        _end_of_interval(lows, -1, is_ratio=is_ratio), _end_of_interval(highs, 1, is_ratio=is_ratio)
    )


def _end_of_interval(values: Sequence[float], sign: Literal[-1, 1], *, is_ratio: bool) -> float:
    # Without variance, t · s is 0; the formula would add rounding errors, or NaN for infinities.
    if min(values) == max(values):
        return values[0]  # exactly, also if infinite
    if is_ratio:
        values = [math.log(value) if value > 0 else -math.inf for value in values]
    if not all(map(math.isfinite, values)):
        end = sign * math.inf
    else:
        n = len(values)
        scaled, exponent = _scaled(values)
        end = mean(scaled) + sign * _student_t(n) * stdev(scaled) / math.sqrt(n)
        if n > MAX_SEEDS_WITHIN_T and not _differ_by_rounding(scaled):
            end = sign * max(sign * end, sign * _bootstrap_interval(scaled)[0 if sign < 0 else 1])
        end = _unscaled(end, exponent)
    return _exp(end) if is_ratio else end


def _student_t(n: int, probability: float = (1 + CONFIDENCE) / 2) -> float:
    from scipy.special import stdtrit  # not at the top: only reports pay for its import

    return float(stdtrit(n - 1, probability))


def _differ_by_rounding(values: Sequence[float]) -> bool:
    # Then the means of resamples differ by rounding only, and their distribution is not that of the values.
    return max(values) - min(values) <= 1e-14 * max(map(abs, values))


def _scaled(values: Sequence[float]) -> tuple[list[float], int]:
    """Return `values` divided by a power of two, and its exponent.

    Finite magnitudes are then at most 1, whose squares and cubes neither overflow nor become 0.
    """
    exponent = math.frexp(max((abs(value) for value in values if math.isfinite(value)), default=0.0))[1]
    return [math.ldexp(value, -exponent) for value in values], exponent


def _unscaled(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def _bootstrap_interval(values: Sequence[float]) -> Bounds:
    from scipy.stats import bootstrap

    if mean(values) < 0:  # so that a ratio and its inverse are resampled alike
        low, high = _bootstrap_interval([-value for value in values])
        return -high, -low
    n = len(values)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student_t(n))
    low, high = bootstrap(
        (sorted(values),),
        _mean,
        confidence_level=1 - 2 * tail,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=BOOTSTRAP_SEED,
    ).confidence_interval
    return float(low), float(high)


def _mean(values: Any, axis: int) -> Any:
    return values.mean(axis=axis)


def permutation_p_value(values: Sequence[float]) -> float | None:
    """Return the two-sided p value of the paired permutation test.

    Its null hypothesis is that the mean of `values` is 0. The sign of each seed's difference (for ratios, of
    its logarithm) is exchangeable if the variants are equal. All 2ⁿ sign changes are enumerated, so the test
    is exact; beyond `MAX_EXACT_SEEDS` seeds it is computed from a seeded sample of them. It cannot be below
    2 / 2ⁿ. None without values or if one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        return None
    if len(values) == 1 or all(value == 0 for value in values):
        return 1.0
    from scipy.stats import permutation_test

    scaled, _ = _scaled(sorted(values))
    return float(
        permutation_test(
            (scaled,),
            _mean,
            permutation_type="samples",
            n_resamples=2**MAX_EXACT_SEEDS,
            rng=BOOTSTRAP_SEED,
        ).pvalue
    )


def more_seeds(values: Sequence[float]) -> int | None:
    """Return how many more seeds would exclude 0 from the interval of the mean.

    They would do so with the probability `POWER`, by Student's t interval.

    `values` are differences, or logarithms of ratios. The effect and its standard deviation are assumed to be
    those observed. None if the observed mean is 0, or more than `MAX_SEEDS` would be needed.
    """
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return max(MIN_SEEDS - n, 0) or None
    values, _ = _scaled(values)
    effect, deviation = abs(mean(values)), stdev(values)
    for needed in range(max(n + 1, MIN_SEEDS), MAX_SEEDS + 1):
        t = _student_t(needed) + _student_t(needed, POWER)
        if effect > 0 and effect >= t * deviation / math.sqrt(needed):
            return needed - n
    return None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
