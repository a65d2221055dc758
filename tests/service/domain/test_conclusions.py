import math

import pytest

from service.domain.conclusions import describe_interval
from service.domain.jobs import JobState
from service.domain.statistics import Interval
from tests.service.domain.comparison_runs import FAST, SLOW, make_run, make_runs, report_of


def conclusion(*variants, **options):
    return report_of(*variants, **options).conclusion


def test_the_best_variant_is_named_with_its_interval():
    found = conclusion(make_runs("none", SLOW), make_runs("sync", FAST))
    assert found.best == found.subject == "norm=sync"
    assert found.sentence.startswith(
        "norm=sync is best: it needs 14.7 times fewer steps to accuracy ≥ 0.8 than norm=none (95 % interval "
    )
    assert "3 seeds, exact permutation test p = 0.25, the smallest possible with 3 seeds)." in found.sentence
    assert found.is_final
    assert "95 % interval" in found.rule


def test_variants_that_are_not_separated_from_the_best_are_named():
    slightly = {
        seed: [(step + 1 if step else 0, value) for step, value in curve] for seed, curve in FAST.items()
    }
    mixed = {0: FAST[2], 1: FAST[0], 2: FAST[1]}
    found = conclusion(make_runs("none", SLOW), make_runs("batch", mixed), make_runs("sync", slightly))
    assert {found.best, *found.equal} == {"norm=batch", "norm=sync"}
    assert "It cannot be distinguished from norm=" in found.sentence
    fastest = {seed: [(0, 0.1), (9, 0.5), (10, 0.9)] for seed in range(3)}
    found = conclusion(make_runs("none", SLOW), make_runs("batch", FAST), make_runs("sync", fastest))
    assert (found.best, found.equal) == ("norm=sync", [])


def test_a_baseline_is_best_if_all_others_are_slower():
    found = conclusion(make_runs("sync", FAST), make_runs("none", SLOW))
    assert found.best == "norm=sync"
    assert found.sentence.startswith("The baseline norm=sync is best: norm=none needs 14.7 times more steps")


def test_a_baseline_that_never_reaches_the_target_bounds_the_ratio():
    never = {seed: [(0, 0.1), (2000, 0.2)] for seed in range(3)}
    found = conclusion(make_runs("none", never), make_runs("sync", FAST))
    assert "it needs at least 14.7 times fewer steps" in found.sentence
    assert "95 % interval at least" in found.sentence
    inverse = conclusion(make_runs("sync", FAST), make_runs("none", never))
    assert "norm=none needs at least 14.7 times more steps" in inverse.sentence


def test_an_interval_with_no_difference_cannot_tell_and_proposes_seeds():
    mixed = {0: [(0, 0.1), (800, 0.9)], 1: [(0, 0.1), (1900, 0.9)], 2: [(0, 0.1), (1000, 0.9)]}
    found = conclusion(make_runs("none", SLOW), make_runs("sync", mixed))
    assert found.best is None
    assert found.sentence.startswith(
        "Cannot tell whether norm=sync needs fewer steps to accuracy ≥ 0.8 than norm=none: the interval of "
        "the ratio contains 1 (95 % interval "
    )
    assert "more seeds per variant would probably settle it" in found.sentence
    equal = {0: SLOW[1], 1: SLOW[2], 2: SLOW[0]}
    hopeless = conclusion(
        make_runs(
            "none", {0: [(0, 0.1), (2000, 0.9)], 1: [(0, 0.1), (1000, 0.9)], 2: [(0, 0.1), (1500, 0.9)]}
        ),
        make_runs(
            "sync", {0: [(0, 0.1), (1000, 0.9)], 1: [(0, 0.1), (2000, 0.9)], 2: [(0, 0.1), (1500, 0.9)]}
        ),
    )
    assert "The runs show no difference at all" in hopeless.sentence
    assert conclusion(make_runs("none", SLOW), make_runs("sync", equal)).best is None


@pytest.mark.parametrize(("seeds", "word"), [(1, "2 more"), (2, "1 more")])
def test_few_seeds_cannot_tell(seeds, word):
    few = {seed: FAST[seed] for seed in range(seeds)}
    found = conclusion(make_runs("none", SLOW), make_runs("sync", few))
    assert found.sentence.startswith(
        f"Cannot tell: an interval needs at least 3 seeds, {word} than there are."
    )
    assert "norm=sync needed" in found.sentence
    assert found.best is None


def test_an_unfinished_comparison_is_marked():
    running = {seed: [(0, 0.1), (100, 0.85)] for seed in range(3)}
    found = conclusion(make_runs("none", SLOW), make_runs("sync", running, state=JobState.RUNNING))
    assert found.sentence.startswith(
        "Not finished (3 of 6 runs have ended; compared up to step 100). So far: "
    )
    assert not found.is_final


def test_a_difference_of_final_values_is_added():
    higher = {seed: [*curve, (2001, 0.97 + seed / 1000)] for seed, curve in FAST.items()}
    level = {seed: [*curve, (2001, 0.90 + seed / 1000)] for seed, curve in SLOW.items()}
    found = conclusion(make_runs("none", level), make_runs("sync", higher))
    assert "The final accuracy of norm=sync is better: 0.07 higher" in found.sentence


def test_failures_divergence_and_missing_data_are_named():
    failed = make_runs("sync", FAST, state=JobState.FAILED, failure_kind="user_code")
    assert "3 of 3 runs of norm=sync failed" in conclusion(make_runs("none", SLOW), failed).sentence
    diverged = make_runs("sync", {seed: [(0, 0.1), (1, 0.1)] for seed in range(3)}, failure_kind="diverged")
    assert "3 of the 3 runs of norm=sync diverged" in conclusion(make_runs("none", SLOW), diverged).sentence
    empty = make_runs("none", {seed: [] for seed in range(3)})
    assert "the baseline has no data" in conclusion(empty, make_runs("sync", FAST)).sentence
    assert "nothing to compare" in conclusion(make_runs("none", SLOW)).sentence
    low = {seed: [(0, 0.1), (2000, 0.2)] for seed in range(3)}
    assert "no run of norm=sync or norm=none reached accuracy ≥ 0.8" in (
        conclusion(make_runs("none", low), make_runs("sync", low)).sentence
    )


def test_intervals_in_words():
    assert describe_interval(Interval(8.06, 10.55)) == "8.06 to 10.6"
    assert describe_interval(Interval(8.0, math.inf)) == "at least 8"
    assert describe_interval(Interval(-math.inf, 0.5)) == "at most 0.5"
    assert describe_interval(Interval(-math.inf, math.inf)) == "unbounded"
    assert describe_interval(Interval(0.0, math.inf)) == "unbounded"


def steps_to(*steps, spacing=10):
    """Curves that reach the target at these steps, evaluated shortly before as well."""
    return {seed: [(0, 0.1), (step - spacing, 0.5), (step, 0.9)] for seed, step in enumerate(steps)}


def test_a_variant_whose_runs_diverged_is_not_the_best():
    faster = [
        *make_runs("sync", dict(list(steps_to(100, 100, 100).items()))),
        *(
            make_run({"norm": "sync"}, seed, [(0, 0.1), (90, 0.5), (100, 0.9)], failure_kind="diverged")
            for seed in (3, 4, 5)
        ),
    ]
    found = conclusion(make_runs("none", steps_to(*[1000] * 6)), faster)
    assert found.best is None
    assert "3 of the 6 runs of norm=sync diverged" in found.sentence
    assert "The final accuracy" not in found.sentence  # that of a diverged run is worse than any other


def test_only_an_undecided_effect_is_called_undecided():
    baseline = make_runs("none", steps_to(1000, 1010, 990))
    slower = make_runs("batch", steps_to(2000, 2010, 1990))
    undecided = make_runs("sync", steps_to(700, 1400, 1000))
    found = conclusion(baseline, slower, undecided)
    assert found.subject == "norm=sync"
    assert "Cannot tell whether norm=sync" in found.sentence
    assert "norm=batch is slower than norm=none" in found.sentence
    failed = make_runs("sync", steps_to(700, 1400, 1000), state=JobState.FAILED, failure_kind="user_code")
    assert "contains 1" not in conclusion(baseline, slower, failed).sentence


def test_the_best_variant_is_that_with_the_largest_certain_advantage():
    baseline = make_runs("none", steps_to(9000, 9010, 8990))
    uncertain = make_runs("batch", steps_to(1200, 3000, 2800))
    certain = make_runs("sync", steps_to(3000, 3010, 2990))
    found = conclusion(baseline, uncertain, certain)
    assert found.best == "norm=sync"
    assert found.equal == ["norm=batch"]


def test_a_difference_within_the_grid_of_evaluations_is_none():
    """Evaluated every 100 steps, 300 and 200 may be 201 and 200."""
    found = conclusion(
        make_runs("none", steps_to(300, 300, 300, spacing=100)),
        make_runs("sync", steps_to(200, 200, 200, spacing=100)),
    )
    assert found.best is None
    assert found.effect.interval.low == pytest.approx(1)
    assert found.effect.interval.high == pytest.approx(3)


def test_equal_curves_need_as_many_steps():
    same = steps_to(1000, 1000)
    sentence = conclusion(make_runs("none", same), make_runs("sync", same)).sentence
    assert "norm=sync needed as many steps to accuracy ≥ 0.8 as norm=none" in sentence


def test_failures_of_the_baseline_are_named_and_do_not_set_the_target():
    failed = [
        make_run({"norm": "none"}, seed, [(0, 0.1), (10, 0.12)], JobState.FAILED, "user_code")
        for seed in (1, 2)
    ]
    report = report_of([*make_runs("none", {0: SLOW[0]}), *failed], make_runs("sync", FAST), target=None)
    assert report.setting.target == 0.85
    assert report.conclusion.sentence == "Cannot tell: 2 of 3 runs of the baseline failed."


def test_exact_tests_are_called_so_only_if_they_are():
    many = range(1000, 1020)
    found = conclusion(make_runs("none", steps_to(*many)), make_runs("sync", steps_to(*[100] * 20)))
    assert "permutation test p =" in found.sentence
    assert "exact" not in found.sentence
