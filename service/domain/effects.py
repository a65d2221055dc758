"""Effects of a variant: its runs against those of another variant, paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Literal

from service.domain.statistics import (
    Bounds,
    Curve,
    Interval,
    Spread,
    area,
    mean_interval,
    more_seeds,
    permutation_p_value,
    reaching_steps,
    spread,
    steps_to_target,
    value_at,
)
from trainer.jobspec import Direction, best_value

Measure = Literal[
    "steps_to_target", "samples_to_target", "seconds_to_target", "best", "final", "area", "seconds_per_step"
]
Kind = Literal["ratio", "difference"]
Outcome = Literal["better", "worse", "cannot tell"]

KINDS: dict[Measure, Kind] = {
    "steps_to_target": "ratio",
    "samples_to_target": "ratio",
    "seconds_to_target": "ratio",
    "best": "difference",
    "final": "difference",
    "area": "difference",
    "seconds_per_step": "ratio",
}
"""How each measure of two runs is compared.

A ratio is the reference's number divided by the variant's, since less is better; a difference is the
variant's number minus the reference's.
"""
WORST: dict[Direction, float] = {"max": -math.inf, "min": math.inf}
NO_DIFFERENCE: dict[Kind, float] = {"ratio": 1.0, "difference": 0.0}


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Curves of a run up to a common step."""

    metric: Curve
    """The compared metric, finite points only."""
    seconds: Curve = ()
    """Seconds of training by step."""
    batch_size: int = 1
    """Samples per step."""
    diverged: bool = False
    """Whether the run diverged, so that it has no final value."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Effect of a variant on one measure, against a reference, over paired seeds."""

    measure: Measure
    kind: Kind
    seeds: int
    """Number of seeds that both variants have."""
    estimate: Interval
    """Geometric mean of the ratios, or mean of the differences; bounds, if runs did not reach the target.

    Steps are those of the first evaluation at the target.
    """
    spread: Spread | None
    """Median and range of the ratios or differences; where the reference did not reach the target, of their
    lower bounds. Runs that did not reach it themselves are left out.
    """
    interval: Interval | None
    """95 % interval of the mean over seeds; None for fewer than three seeds.

    The target may have been reached at any step since the evaluation before, which the interval includes.
    """
    p_value: float | None
    """p value of the exact paired permutation test; None if only bounds are known."""
    outcome: Outcome
    """Better or worse only if the interval excludes no difference."""
    more_seeds: int | None
    """Number of further seeds that would probably decide an open outcome; None if unknown or too large."""

    @property
    def is_at_least(self) -> bool:
        """Return whether the estimate is only a lower bound."""
        return self.estimate.low < self.estimate.high == math.inf


def measure(
    name: Measure, run: RunData, target: float | None, direction: Direction, end: int | None = None
) -> Bounds | None:
    """Return bounds of a measure of a run, or None without data.

    A run that did not reach the target gives its last step as a lower bound, since it may reach it later.
    Step 0 counts as 1, because a ratio needs a divisor. An area ends at step `end`. The final value of a run
    that diverged is worse than any other.
    """
    if not run.metric:
        return None
    last_step, last_value = run.metric[-1]
    value: float | None
    match name:
        case "steps_to_target" | "samples_to_target" | "seconds_to_target":
            reached = None if target is None else steps_to_target(run.metric, target, direction)
            value = _cost(name, run, max(last_step if reached is None else reached, 1))
            if target is None or value is None:
                return None
            return value, math.inf if reached is None else value
        case "best":
            value = best_value((value for _, value in run.metric), direction)
        case "final":
            value = WORST[direction] if run.diverged else last_value
        case "area":
            value = area(run.metric, last_step if end is None else end)
        case "seconds_per_step":
            value = seconds_per_step(run.seconds)
    return None if value is None else (value, value)


def _between_evaluations(
    name: Measure, run: RunData, target: float | None, direction: Direction, found: Bounds
) -> Bounds:
    """Extend the time to a target down to the evaluation before it."""
    if not name.endswith("_to_target") or target is None:
        return found
    steps = reaching_steps(run.metric, target, direction)
    if steps is None or steps[0] == steps[1]:
        return found
    before = _cost(name, run, int(steps[0])) if steps[0] > 0 else 0.0
    return found if before is None else (min(before, found[0]), found[1])


def _cost(name: Measure, run: RunData, steps: int) -> float | None:
    """Return what `steps` take: steps, samples or seconds."""
    if name == "steps_to_target":
        return steps
    if name == "samples_to_target":
        return steps * run.batch_size
    seconds = value_at(run.seconds, steps)
    return seconds if seconds is not None and seconds > 0 else None


def seconds_per_step(seconds: Curve) -> float | None:
    """Return the mean time of a step between the first and the last point, or None."""
    if len(seconds) < 2 or seconds[-1][0] == seconds[0][0]:
        return None
    value = (seconds[-1][1] - seconds[0][1]) / (seconds[-1][0] - seconds[0][0])
    return value if value > 0 else None


def effect_of(
    name: Measure,
    runs: Mapping[int, RunData],
    reference: Mapping[int, RunData],
    target: float | None,
    direction: Direction,
) -> Effect | None:
    """Return the effect of `runs` against `reference`, by seed.

    None without common data.
    """
    combine = _ratio if KINDS[name] == "ratio" else _difference
    pairs, wider = [], []
    for seed in sorted(runs.keys() & reference.keys()):
        pair = runs[seed], reference[seed]
        end = min((run.metric[-1][0] for run in pair if run.metric), default=None)
        ours, theirs = (measure(name, run, target, direction, end) for run in pair)
        if ours is not None and theirs is not None:
            pairs.append(combine(ours, theirs))
            wider.append(
                combine(
                    _between_evaluations(name, pair[0], target, direction, ours),
                    _between_evaluations(name, pair[1], target, direction, theirs),
                )
            )
    return _summarise(name, pairs, wider, direction) if pairs else None


def _ratio(ours: Bounds, theirs: Bounds) -> Bounds:
    """Return bounds of theirs / ours."""
    return theirs[0] / ours[1], theirs[1] / ours[0] if ours[0] > 0 else math.inf  # x / inf = 0


def _difference(ours: Bounds, theirs: Bounds) -> Bounds:
    if math.isinf(ours[0]) and ours == theirs:  # both diverged
        return -math.inf, math.inf
    return ours[0] - theirs[1], ours[1] - theirs[0]


def _summarise(
    name: Measure, pairs: Sequence[Bounds], wider: Sequence[Bounds], direction: Direction
) -> Effect:
    kind = KINDS[name]
    interval = mean_interval(wider, is_ratio=kind == "ratio")
    less_is_better = kind == "difference" and direction == "min"
    outcome = _outcome(interval, NO_DIFFERENCE[kind], less_is_better=less_is_better)
    lows, highs = zip(*pairs, strict=True)
    is_known = lows == highs and all(map(math.isfinite, lows))
    known = [low if kind == "difference" else math.log(low) for low in lows] if is_known else []
    return Effect(
        measure=name,
        kind=kind,
        seeds=len(pairs),
        estimate=Interval(_mean(lows, kind), _mean(highs, kind)),
        spread=spread([low for low in lows if math.isfinite(low) and (kind == "difference" or low > 0)]),
        interval=interval,
        p_value=permutation_p_value(known),
        outcome=outcome,
        more_seeds=more_seeds(known) if outcome == "cannot tell" and known else None,
    )


def _mean(values: Sequence[float], kind: Kind) -> float:
    if kind == "difference":
        infinite = {value for value in values if math.isinf(value)}
        # Runs that diverged on both sides: nothing is known.
        return math.nan if len(infinite) > 1 else sum(values) / len(values)
    if min(values) == 0 or max(values) == math.inf:
        return 0.0 if min(values) == 0 else math.inf
    return geometric_mean(values)


def _outcome(interval: Interval | None, none: float, *, less_is_better: bool) -> Outcome:
    if interval is None or none in interval:
        return "cannot tell"
    return "better" if (interval.low > none) != less_is_better else "worse"
