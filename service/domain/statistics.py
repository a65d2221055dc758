"""From curves to a verdict: steps to a target, their spread over seeds, and ratios against the baseline; pure."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high, median_low
from typing import Literal

from trainer.spec import Direction, best_value, is_reached

Curve = Sequence[tuple[int, float]]
"""A metric by step, in the order of steps."""

MIN_SEEDS = 3
"""Fewer have no interval."""
BOOTSTRAP_SAMPLES = 2000
BOOTSTRAP_SEED = 0
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
    """What a variant's runs show."""

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
    """First step at which the metric is `target` or better; None if it never is."""
    return next((step for step, value in curve if is_reached(value, target, direction)), None)


def spread(values: Sequence[float]) -> Spread | None:
    """Median and range of `values`; None if there are none."""
    return Spread(median=median(values), low=min(values), high=max(values)) if values else None


def bootstrap_median(bounds: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the median over paired seeds; None for fewer than `MIN_SEEDS` or a bound that is NaN.

    Each seed has a lower and an upper bound, which are equal for a number that is known. Seeds are resampled with replacement,
    by a fixed random seed, so that equal runs get equal verdicts. Of up to six seeds the interval is their range, which
    contains the median of all seeds with a probability of 1 - 2^(1 - n): 0.75 for three, 0.97 for six.
    """
    if len(bounds) < MIN_SEEDS or any(math.isnan(end) for pair in bounds for end in pair):
        return None
    generator = random.Random(BOOTSTRAP_SEED)  # noqa: S311 - no secret
    ordered = sorted(bounds)  # the order of the seeds has no effect
    lows, highs = [], []
    for _ in range(BOOTSTRAP_SAMPLES):
        sample = generator.choices(ordered, k=len(ordered))
        # Not the mean of the middle two of an even number, which two infinite bounds do not have.
        lows.append(median_low([low for low, _ in sample]))
        highs.append(median_high([high for _, high in sample]))
    tail = round(BOOTSTRAP_SAMPLES * (1 - CONFIDENCE) / 2)
    return sorted(lows)[tail], sorted(highs)[-1 - tail]


def best_of(curves: Iterable[Curve], direction: Direction) -> Spread | None:
    """Median and range of the best values of the curves that have values."""
    return spread([best_value((value for _, value in curve), direction) for curve in curves if curve])


def default_target(baseline: Mapping[int, Curve], direction: Direction = "max") -> float | None:
    """The baseline's best value, median over its seeds: the target in Figure 3 of Ioffe & Szegedy 2015."""
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
    """Measure a variant's `runs` (curve by seed) against the baseline's.

    Ratios are taken seed by seed. "faster" and "slower" are said only if every run reached the target and the ratios of all
    seeds agree. `failed` and `unfinished` count the runs in those states.
    """
    curves = {seed: curve for seed, curve in runs.items() if curve}
    steps: dict[int, int | None] = {}
    if target is not None:
        steps = {seed: steps_to_target(curve, target, direction) for seed, curve in curves.items()}
    reached = {seed: step for seed, step in steps.items() if step is not None}
    ratios, is_at_least = _ratios(reached, baseline, target, direction) if target is not None else ([], False)
    ratio = spread(ratios)
    return VariantResult(
        n=len(curves),
        reached=len(reached),
        failed=failed,
        steps_to_target=spread(list(reached.values())),
        best=best_of(curves.values(), direction),
        final=spread([curve[-1][1] for curve in curves.values()]),
        ratio=None if is_baseline else ratio,
        ratio_is_at_least=is_at_least and not is_baseline,
        verdict="baseline"
        if is_baseline
        else _verdict(len(curves), len(reached), ratio, is_at_least=is_at_least, failed=failed, unfinished=unfinished),
    )


def _ratios(
    reached: Mapping[int, int], baseline: Mapping[int, Curve], target: float, direction: Direction
) -> tuple[list[float], bool]:
    """Baseline's steps over the variant's for each seed that both have. Step 0 counts as 1: a ratio needs a divisor."""
    ratios, is_at_least = [], False
    for seed, steps in reached.items():
        curve = baseline.get(seed)
        if not curve:
            continue
        baseline_steps = steps_to_target(curve, target, direction)
        if baseline_steps is None:
            baseline_steps, is_at_least = curve[-1][0], True
        ratios.append(max(baseline_steps, 1) / max(steps, 1))
    return ratios, is_at_least


def _verdict(n: int, reached: int, ratio: Spread | None, *, is_at_least: bool, failed: int, unfinished: int) -> Verdict:
    if failed:
        return "runs failed"
    if unfinished and (n == 0 or reached < n):
        return "not finished"
    if n == 0 or reached < n:
        return "target not reached"
    if ratio is None:
        return "not finished" if unfinished else "baseline without data"
    if ratio.low > 1:
        return "faster" if n > 1 else "faster on one seed"
    if ratio.high < 1 and not is_at_least:
        return "slower" if n > 1 else "slower on one seed"
    return "no clear difference"
