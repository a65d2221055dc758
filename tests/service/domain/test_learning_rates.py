from service.domain.jobs import JobState
from tests.service.domain.comparison_runs import make_run, report_of

REACHES, MISSES = [(0, 0.1), (100, 0.9)], [(0, 0.1), (100, 0.2)]


def runs(norm, rate, *curves, **options):
    return [
        make_run({"norm": norm, "optimizer.lr": rate}, seed, curve, **options)
        for seed, curve in enumerate(curves)
    ]


def test_a_rate_is_usable_if_all_seeds_reach_the_target():
    report = report_of(
        runs("none", 0.1, REACHES, REACHES),
        runs("none", 1, REACHES, MISSES),
        runs("none", 10, MISSES, MISSES, failure_kind="diverged"),
        runs("sync", 0.1, REACHES, REACHES),
        runs("sync", 1, REACHES, REACHES),
        runs("sync", 10, REACHES, REACHES),
        runs("sync", 100, REACHES, [], state=JobState.RUNNING),
    )
    none, sync = report.usable_rates
    assert (none.label, none.tried, none.usable, none.width) == ("norm=none", [0.1, 1, 10], [0.1], 1)
    assert (sync.label, sync.usable, sync.width) == ("norm=sync", [0.1, 1, 10], 100)


def test_no_rate_is_usable_or_varied():
    report = report_of(runs("none", 0.1, MISSES), runs("none", 1, MISSES))
    assert [rates.width for rates in report.usable_rates] == [None]
    assert report_of([make_run({"norm": "none"}, 0, REACHES)]).usable_rates == []
