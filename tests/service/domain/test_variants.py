import math

import pytest

from service.domain.jobs import JobState
from service.domain.statistics import Spread
from tests.service.domain.comparison_runs import FAST, SLOW, make_run, make_runs, report_of


def verdicts(*variants, **options):
    return [result.verdict for result in report_of(*variants, **options).variants]


def test_results_of_a_faster_variant():
    baseline, faster = report_of(make_runs("none", SLOW), make_runs("sync", FAST)).variants
    assert (baseline.verdict, faster.verdict) == ("baseline", "faster")
    assert (faster.n, faster.reached, faster.failed, faster.diverged) == (3, 3, 0, 0)
    assert faster.measures["steps_to_target"] == Spread(low=100, median=125, high=200)
    assert faster.measures["best"].high == 0.9
    assert faster.measures["final"].low == 0.8
    assert baseline.effects == {}
    assert verdicts(make_runs("none", FAST), make_runs("sync", SLOW)) == ["baseline", "slower"]


def test_a_variant_that_never_reaches_the_target_is_slower_than_one_that_does():
    never = {seed: [(0, 0.1), (2000, 0.2)] for seed in range(3)}
    assert verdicts(make_runs("none", FAST), make_runs("sync", never)) == ["baseline", "slower"]
    assert verdicts(make_runs("none", never), make_runs("sync", never)) == ["baseline", "target not reached"]


def test_two_seeds_are_too_few_and_seeds_that_disagree_cannot_decide():
    two = {seed: FAST[seed] for seed in (0, 1)}
    assert verdicts(make_runs("none", SLOW), make_runs("sync", two)) == ["baseline", "cannot tell"]
    mixed = FAST | {1: [(0, 0.1), (4000, 0.9)]}
    assert verdicts(make_runs("none", SLOW), make_runs("sync", mixed)) == ["baseline", "cannot tell"]


def test_failed_and_cancelled_runs_give_no_verdict():
    failed = make_runs("sync", FAST, state=JobState.FAILED, failure_kind="user_code")
    assert verdicts(make_runs("none", SLOW), failed) == ["baseline", "runs failed"]
    cancelled = make_runs("sync", FAST, state=JobState.CANCELLED)
    assert verdicts(make_runs("none", SLOW), cancelled) == ["baseline", "runs failed"]


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_divergence_is_an_outcome(state):
    """Runs that diverged before the target have not reached it, whatever their last step."""
    diverged = make_runs(
        "none",
        {seed: [(0, 0.1), (100, 0.2)] for seed in range(3)},
        state=state,
        failure_kind="diverged",
    )
    faster = report_of(make_runs("sync", FAST), diverged).variants[1]
    assert (faster.diverged, faster.failed, faster.reached) == (3, 0, 0)
    assert faster.measures["final"] is None
    assert faster.verdict == "cannot tell"  # 100 steps without the target are fewer than 100 to 200 with it
    infinite = {seed: [(0, 0.1), (3000, math.inf)] for seed in range(3)}
    assert report_of(make_runs("sync", FAST), make_runs("none", infinite)).variants[1].diverged == 3


def test_without_data_there_is_no_verdict():
    empty = {seed: [] for seed in range(3)}
    assert verdicts(make_runs("none", SLOW), make_runs("sync", empty)) == ["baseline", "target not reached"]
    assert verdicts(make_runs("none", empty), make_runs("sync", FAST)) == [
        "baseline",
        "baseline without data",
    ]
    queued = make_runs("sync", empty, state=JobState.QUEUED)
    assert verdicts(make_runs("none", SLOW), queued) == ["baseline", "not finished"]


def test_unfinished_runs_are_compared_on_the_same_steps():
    """The running variant is at step 1800, where the finished one had 0.7."""
    running = {seed: [(0, 0.1), (1800, 0.88)] for seed in range(3)}
    report = report_of(
        make_runs("none", SLOW), make_runs("sync", running, state=JobState.RUNNING), target=0.89
    )
    assert report.setting.last_step == 1800
    baseline, variant = report.variants
    assert baseline.measures["final"].high == 0.75
    assert baseline.reached == 0
    assert variant.effects["final"].outcome == "better"
    assert report.variants[1].verdict == "not finished"
    finished = report_of(make_runs("none", SLOW), make_runs("sync", running))
    assert finished.setting.last_step is None
    assert finished.variants[0].measures["final"].high == 0.9


def test_a_run_without_points_does_not_end_the_comparison_at_its_first_step():
    runs = [*make_runs("sync", FAST), make_run({"norm": "sync"}, 3, [], state=JobState.QUEUED)]
    assert report_of(make_runs("none", SLOW), runs).setting.last_step is None


def test_the_direction_follows_from_the_metric():
    high = {seed: [(0, 2.3), (900, 0.6), (1000, 0.45)] for seed in range(3)}
    low = {seed: [(0, 2.3), (90, 0.6), (100, 0.3)] for seed in range(3)}
    for metric in ("test_loss", "calibration_error"):
        found = report_of(make_runs("none", high), make_runs("sync", low), target=0.5, metric=metric)
        assert found.setting.direction == "min"
        assert found.variants[1].verdict == "faster"
        assert found.variants[1].effects["best"].outcome == "better"
