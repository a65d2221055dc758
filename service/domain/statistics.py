"""Statistics of curves: steps to a target, spread over seeds, ratios, intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Literal

from trainer.jobspec import Direction, best_value, is_reached

Curve = Sequence[tuple[int, float]]
"""A metric by step, in the order of steps."""

MIN_SEEDS = 3
"""Fewer have no interval."""
CONFIDENCE = 0.95

Verdict = Literal[
    "baseline",
    "faster",
    "faster on one seed",
    "slower",
    "slower on one seed",
    "no clear difference",
    "target not reached",
    "baseline without data",
    "runs failed",
    "not finished",
]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range over seeds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """Results of a variant's runs."""

    n: int
    """Runs with a curve."""
    reached: int
    """Runs that reached the target."""
    failed: int
    """Runs that failed or were cancelled; what they logged until then counts as data."""
    steps_to_target: Spread | None
    """Over the runs that reached it."""
    best: Spread | None
    final: Spread | None
    ratio: Spread | None
    """Steps of the baseline over this variant's, seed by seed: above 1 is faster."""
    ratio_is_at_least: bool
    """Whether some run of the baseline never reached the target, so that its last step stands in and the true ratio is larger."""
    verdict: Verdict


def steps_to_target(curve: Curve, target: float, direction: Direction = "max") -> int | None:
    """Return the first step at which the metric is `target` or better, or None."""
    return next((step for step, value in curve if is_reached(value, target, direction)), None)


def spread(values: Sequence[float]) -> Spread | None:
    """Return median and range of `values`, or None without values."""
    return Spread(median=median(values), low=min(values), high=max(values)) if values else None


def mean_interval(bounds: Sequence[tuple[float, float]], *, is_ratio: bool = False) -> tuple[float, float] | None:
    """Return Student's t interval of the mean over paired seeds: mean ± t · s / √n.

    It has n - 1 degrees of freedom and level `CONFIDENCE`.

    Of ratios it is that of the geometric mean, from their logarithms: a ratio and its inverse get the same verdict. Its level does
    not depend on n, unlike that of the range; it assumes that seeds (of ratios, their logarithms) are about normal.
    Each seed has a lower and an upper bound, which are equal for a number that is known. The lower end is that of the lower bounds,
    whose mean is at most that of the numbers, and the upper end that of the upper bounds. An end that an infinite bound leaves open
    is infinite. None for fewer than `MIN_SEEDS`, a bound that is NaN, or a negative ratio.
    """
    ends = [end for pair in bounds for end in pair]
    if len(bounds) < MIN_SEEDS or any(math.isnan(end) or (is_ratio and end < 0) for end in ends):
        return None
    lows, highs = zip(*bounds, strict=True)
    return _end_of_interval(lows, -1, is_ratio=is_ratio), _end_of_interval(highs, 1, is_ratio=is_ratio)


def _end_of_interval(values: Sequence[float], sign: Literal[-1, 1], *, is_ratio: bool) -> float:
    from scipy.special import stdtrit  # not at the top: only reports pay for its import

    if min(values) == max(values):
        return values[0]  # exactly, also if infinite
    if is_ratio:
        values = [math.log(value) if value > 0 else -math.inf for value in values]
    n = len(values)
    if all(map(math.isfinite, values)):
        t = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
        end = fmean(values) + sign * t * stdev(values) / math.sqrt(n)
    else:
        end = sign * math.inf
    return _exp(end) if is_ratio else end


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def best_of(curves: Iterable[Curve], direction: Direction) -> Spread | None:
    """Return median and range of the best values of non-empty curves."""
    return spread([best_value((value for _, value in curve), direction) for curve in curves if curve])


def default_target(baseline: Mapping[int, Curve], direction: Direction = "max") -> float | None:
    """Return the median best value of the baseline, the target in Figure 3 of the paper."""
    best = best_of(baseline.values(), direction)
    return best.median if best else None


def compare(
    runs: Mapping[int, Curve],
    baseline: Mapping[int, Curve],
    target: float | None,
    *,
    is_baseline: bool,
    direction: Direction = "max",
    failed: int = 0,
    unfinished: int = 0,
) -> VariantResult:
    """Return the results of a variant's `runs` (curve by seed) against the baseline's.

    Ratios are taken seed by seed. "faster" and "slower" are said only if every run reached the target and the interval of the
    ratio is above or below 1; of one seed, which has no interval, they are said as such. `failed` and `unfinished` count the runs
    in those states.
    """
    curves = {seed: curve for seed, curve in runs.items() if curve}
    steps: dict[int, int | None] = {}
    if target is not None:
        steps = {seed: steps_to_target(curve, target, direction) for seed, curve in curves.items()}
    reached = {seed: step for seed, step in steps.items() if step is not None}
    ratios = _ratios(reached, baseline, target, direction) if target is not None else []
    return VariantResult(
        n=len(curves),
        reached=len(reached),
        failed=failed,
        steps_to_target=spread(list(reached.values())),
        best=best_of(curves.values(), direction),
        final=spread([curve[-1][1] for curve in curves.values()]),
        ratio=None if is_baseline else spread([low for low, _ in ratios]),
        ratio_is_at_least=any(low < high for low, high in ratios) and not is_baseline,
        verdict="baseline"
        if is_baseline
        else _verdict(len(curves), len(reached), ratios, failed=failed, unfinished=unfinished),
    )


def _ratios(
    reached: Mapping[int, int], baseline: Mapping[int, Curve], target: float, direction: Direction
) -> list[tuple[float, float]]:
    """Return bounds of the ratio of steps, baseline to variant, per common seed.

    Step 0 counts as 1, for a ratio needs a divisor. A baseline that never gets there would have taken its last step or more.
    """
    ratios = []
    for seed, steps in reached.items():
        curve = baseline.get(seed)
        if not curve:
            continue
        baseline_steps = steps_to_target(curve, target, direction)
        low = max(curve[-1][0] if baseline_steps is None else baseline_steps, 1) / max(steps, 1)
        ratios.append((low, math.inf if baseline_steps is None else low))
    return ratios


def _verdict(n: int, reached: int, ratios: Sequence[tuple[float, float]], *, failed: int, unfinished: int) -> Verdict:
    if failed:
        return "runs failed"
    if unfinished and (n == 0 or reached < n):
        return "not finished"
    if n == 0 or reached < n:
        return "target not reached"
    if not ratios:
        return "not finished" if unfinished else "baseline without data"
    low, high = ratios[0] if n == 1 else mean_interval(ratios, is_ratio=True) or (-math.inf, math.inf)
    if low > 1:
        return "faster" if n > 1 else "faster on one seed"
    if high < 1:
        return "slower" if n > 1 else "slower on one seed"
    return "no clear difference"
