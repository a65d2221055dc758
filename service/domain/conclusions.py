"""Conclusion of a comparison in one sentence, with its rule and interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.comparisons import Comparison
from service.domain.effects import Effect
from service.domain.statistics import MAX_EXACT_SEEDS, MAX_SEEDS, MIN_SEEDS, Interval
from service.domain.variants import PRIMARY, Setting, VariantResult

RULE = (
    "A variant is faster or slower than the baseline if the 95 % interval of the ratio of steps to the "
    "target (geometric mean over at least 3 paired seeds; the wider of Student's t and the bias-corrected "
    "bootstrap interval) excludes 1."
)


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """Conclusion of a comparison."""

    sentence: str
    is_final: bool
    """Whether all runs have ended."""
    best: str | None
    """Label of the best variant; None if the runs do not show one."""
    equal: Sequence[str]
    """Labels of variants that cannot be distinguished from the best one."""
    effect: Effect | None
    """Effect that the sentence is about."""
    subject: str | None
    """Label of the variant whose effect it is."""
    rule: str = RULE


def conclude(
    comparison: Comparison, variants: Sequence[VariantResult], setting: Setting, *, finished: bool
) -> Conclusion:
    """Return the conclusion: the best variant, or why there is none."""
    goal = goal_of(comparison.metric, setting)
    found = _find_best(variants, setting, goal)
    text = found.text
    if found.subject is not None:
        text += _about_final_value(found.subject, comparison.metric)
    if not finished:
        text = f"Not finished ({_progress(variants, setting)}). So far: {text}"
    return Conclusion(
        sentence=text,
        is_final=finished,
        best=found.best,
        equal=found.equal,
        effect=found.subject.effects[PRIMARY] if found.subject else None,
        subject=found.subject.label if found.subject else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Finding:
    text: str
    subject: VariantResult | None = None
    best: str | None = None
    equal: Sequence[str] = ()


def _find_best(variants: Sequence[VariantResult], setting: Setting, goal: str) -> _Finding:
    baseline = next((result for result in variants if result.verdict == "baseline"), None)
    others = [result for result in variants if result is not baseline]
    if baseline is None or baseline.n == 0:
        return _Finding(text="Cannot tell: the baseline has no data.")
    if not others:
        return _Finding(text=f"There is one variant, {baseline.label}, and nothing to compare it with.")
    if baseline.failed:
        return _Finding(
            text=f"Cannot tell: {baseline.failed} of {len(baseline.runs)} runs of the baseline failed."
        )
    known = [result for result in others if PRIMARY in result.effects]
    if not known:
        return _Finding(text="Cannot tell: no variant has data to compare with the baseline.")
    if candidates := [result for result in known if result.verdict == "faster" and not result.diverged]:
        return _best_of(candidates, baseline, variants, setting, goal)
    if all(result.verdict == "slower" for result in others):
        closest = max(known, key=_strength)
        effect = closest.effects[PRIMARY]
        text = (
            f"The baseline {baseline.label} is best: {closest.label} needs {describe_effect(effect)} to "
            f"{goal} {evidence(effect)}.{_about_divergence(closest)}"
        )
        return _Finding(text=text, subject=closest, best=baseline.label)
    open_results = [result for result in known if result.verdict != "slower"] or known
    subject = max(open_results, key=_strength)
    slower = [result.label for result in others if result.verdict == "slower"]
    text = _undecided(subject, baseline, goal)
    if slower:
        text += f" {_join(slower)} {'is' if len(slower) == 1 else 'are'} slower than {baseline.label}."
    return _Finding(text=text, subject=subject)


def _best_of(
    candidates: Sequence[VariantResult],
    baseline: VariantResult,
    variants: Sequence[VariantResult],
    setting: Setting,
    goal: str,
) -> _Finding:
    best = max(candidates, key=_strength)
    effect, equal = best.effects[PRIMARY], _equal_to(best, variants, setting)
    text = (
        f"{best.label} is best: it needs {describe_effect(effect)} to {goal} than {baseline.label} "
        f"{evidence(effect)}." + (f" It cannot be distinguished from {_join(equal)}." if equal else "")
    )
    return _Finding(text=text, subject=best, best=best.label, equal=equal)


def goal_of(metric: str, setting: Setting) -> str:
    """Return the target in words, such as `accuracy ≥ 0.8`."""
    sign = {"max": "≥", "min": "≤"}[setting.direction]
    return metric if setting.target is None else f"{metric} {sign} {setting.target:.4g}"


def describe_effect(effect: Effect) -> str:
    """Describe a ratio of steps: `9.3 times fewer steps`."""
    low, high = effect.estimate.low, effect.estimate.high
    bound = "at least " if low < high else ""
    if f"{low:.3g}" == f"{high:.3g}" == "1":
        return "as many steps"
    if low >= 1 or (low > 0 and math.isinf(high)):
        return f"{bound}{low:.3g} times fewer steps"
    if 0 < high < 1:
        return f"{bound}{1 / high:.3g} times more steps"
    return "an unknown number of steps"


def evidence(effect: Effect) -> str:
    """Return interval, seeds and p value in parentheses."""
    parts = []
    if effect.interval is not None:
        parts.append(f"95 % interval {describe_interval(effect.interval)}")
    parts.append(f"{effect.seeds} seed{'' if effect.seeds == 1 else 's'}")
    if effect.p_value is not None and effect.seeds >= MIN_SEEDS:
        parts.append(_describe_p_value(effect.p_value, effect.seeds))
    return f"({', '.join(parts)})"


def _describe_p_value(p_value: float, seeds: int) -> str:
    if seeds > MAX_EXACT_SEEDS:
        return f"permutation test p = {p_value:.2g}"
    smallest = math.isclose(p_value, 2 / 2**seeds)
    note = f", the smallest possible with {seeds} seeds" if smallest else ""
    return f"exact permutation test p = {p_value:.2g}{note}"


def describe_interval(interval: Interval) -> str:
    """Describe an interval, whose ends may be infinite: `8.1 to 10.6`, `at least 8.1`."""
    is_open = math.isinf(interval.low), math.isinf(interval.high)
    if is_open[1] and interval.low == 0:  # of a ratio, which is never less
        return "unbounded"
    match is_open:
        case (False, False):
            return f"{interval.low:.3g} to {interval.high:.3g}"
        case (False, True):
            return f"at least {interval.low:.3g}"
        case (True, False):
            return f"at most {interval.high:.3g}"
    return "unbounded"


def _undecided(subject: VariantResult, baseline: VariantResult, goal: str) -> str:
    effect, label = subject.effects[PRIMARY], subject.label
    if subject.failed:
        return f"Cannot tell: {subject.failed} of {len(subject.runs)} runs of {label} failed."
    if subject.reached == baseline.reached == 0:
        text = f"Cannot tell: no run of {label} or {baseline.label} reached {goal}."
    elif effect.seeds < MIN_SEEDS:
        missing = MIN_SEEDS - effect.seeds
        text = (
            f"Cannot tell: an interval needs at least {MIN_SEEDS} seeds, {missing} more than there are. "
            f"{_so_far(subject, baseline, goal)}"
        )
    elif effect.outcome != "cannot tell":  # it diverged, or has not finished
        text = f"Cannot tell. {_so_far(subject, baseline, goal)}"
    else:
        text = (
            f"Cannot tell whether {label} needs fewer steps to {goal} than {baseline.label}: the interval of "
            f"the ratio contains 1 {evidence(effect)}.{_about_more_seeds(effect)}"
        )
    return text + _about_divergence(subject)


def _so_far(subject: VariantResult, baseline: VariantResult, goal: str) -> str:
    effect = subject.effects[PRIMARY]
    text = describe_effect(effect)
    link = "as" if text.startswith("as ") else "than"
    if text.startswith("an unknown"):
        return f"{subject.label} or {baseline.label} has not always reached {goal}."
    return f"{subject.label} needed {text} to {goal} {link} {baseline.label} {evidence(effect)}."


def _about_divergence(result: VariantResult) -> str:
    if not result.diverged:
        return ""
    return f" {result.diverged} of the {len(result.runs)} runs of {result.label} diverged."


def _about_more_seeds(effect: Effect) -> str:
    if effect.more_seeds is not None:
        return f" About {effect.more_seeds} more seeds per variant would probably settle it."
    if effect.p_value is None:
        return ""  # of lower bounds, the spread over seeds is unknown
    if effect.estimate.low == 1:
        return " The runs show no difference at all."
    return f" The difference is probably too small to be settled by {MAX_SEEDS} seeds."


def _about_final_value(subject: VariantResult, metric: str) -> str:
    effect = subject.effects.get("final")
    if effect is None or effect.interval is None or effect.outcome == "cannot tell":
        return ""
    change = effect.estimate.low
    if not math.isfinite(change):  # all runs of one side diverged
        return ""
    return (
        f" The final {metric} of {subject.label} is {effect.outcome}: {abs(change):.3g} "
        f"{'higher' if change > 0 else 'lower'} (95 % interval of the difference "
        f"{describe_interval(effect.interval)})."
    )


def _equal_to(best: VariantResult, variants: Sequence[VariantResult], setting: Setting) -> list[str]:
    """Return the labels of variants from which the runs do not separate the best one."""
    equal = []
    for other in variants:
        if other is not best and other.verdict != "baseline":
            effect = setting.effects(best.runs, other.runs).get(PRIMARY)
            if effect is None or effect.outcome == "cannot tell":
                equal.append(other.label)
    return equal


def _strength(result: VariantResult) -> float:
    """Return the certain ratio of steps, or the estimate without an interval."""
    effect = result.effects[PRIMARY]
    return (effect.estimate if effect.interval is None else effect.interval).low


def _progress(variants: Sequence[VariantResult], setting: Setting) -> str:
    runs = sum(len(result.runs) for result in variants)
    ended = runs - sum(result.unfinished for result in variants)
    text = f"{ended} of {runs} runs have ended"
    return text if setting.last_step is None else f"{text}; compared up to step {setting.last_step:,}"


def _join(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
