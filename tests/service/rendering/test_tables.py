import math

from service.domain.effects import Effect
from service.domain.statistics import Interval, Spread
from service.domain.verdicts import Run, judge
from service.rendering.tables import (
    differences_table,
    findings_table,
    format_effect,
    format_spread,
    rates_table,
    variants_table,
)
from tests.service.domain.comparison_runs import FAST, SLOW, make_run, make_runs, report_of
from tests.service.domain.recipe_factory import FASTER, FINAL, make_recipe


def cells(table, label):
    return dict(zip(table.headings, next(row for row in table.rows if row[0] == label), strict=True))


def test_variants_with_their_effects_and_verdict():
    seconds = [(0, 1.0), (2000, 21.0)]
    table = variants_table(
        report_of(make_runs("none", SLOW, seconds=seconds), make_runs("sync", FAST, seconds=seconds))
    )
    found = cells(table, "norm=sync")
    assert found["verdict"] == "faster"
    assert found["runs with accuracy ≥ 0.8"] == "3 of 3"
    assert found["steps to target"] == "125 (100 to 200)"
    assert found["ratio of steps"].startswith("14.7× (")
    assert found["p"] == "0.25"
    assert found["seconds to target"] == "2.25 (2 to 3)"
    assert found["ms per step"] == "10"
    assert cells(table, "norm=none")["ratio of steps"] == "–"


def test_outcomes_are_counted():
    diverged = [make_run({"norm": "none"}, 9, [(0, 0.1)], failure_kind="diverged")]
    table = variants_table(report_of(make_runs("sync", FAST), make_runs("none", SLOW) + diverged))
    assert cells(table, "norm=none")["runs with accuracy ≥ 0.8"] == "3 of 4, 1 diverged"


def effect(kind, estimate, interval):
    return Effect(
        measure="steps_to_target",
        kind=kind,
        seeds=3,
        estimate=estimate,
        spread=None,
        interval=interval,
        p_value=None,
        outcome="better",
        more_seeds=None,
    )


def test_effects_and_spreads_as_text():
    assert format_effect(None) == "–"
    assert format_effect(effect("ratio", Interval(9, 9), Interval(8, 10))) == "9× (8 to 10)"
    assert format_effect(effect("ratio", Interval(9, math.inf), Interval(8, math.inf))) == "≥ 9× (at least 8)"
    assert format_effect(effect("ratio", Interval(0, 0.4), None)) == "≤ 0.4×"
    assert format_effect(effect("ratio", Interval(0, math.inf), None)) == "–"
    assert (
        format_effect(effect("difference", Interval(0.02, 0.02), Interval(0.01, 0.03)))
        == "+0.02 (0.01 to 0.03)"
    )
    assert format_spread(Spread(median=1500, low=1000, high=2000)) == "1,500 (1,000 to 2,000)"
    assert format_spread(Spread(median=0.5, low=0.5, high=0.5)) == "0.5"


def test_differences_and_usable_rates():
    runs = [
        [make_run({"norm": norm, "optimizer.lr": rate}, 0, [(0, 0.9)])]
        for norm in ("none", "sync")
        for rate in (0.1, 1)
    ]
    report = report_of(*runs)
    assert rates_table(report).rows[0] == ["norm=none", "0.1, 1", "10×", "0.1, 1"]
    assert differences_table(report).headings[0] == "field"


def test_findings_with_their_intervals():
    runs = [
        Run(variant={"norm": norm}, seed=seed, curves={"accuracy": curve})
        for norm, curves in (("none", SLOW), ("sync", FAST))
        for seed, curve in curves.items()
    ]
    table = findings_table(judge(make_recipe(FASTER, FINAL), runs))
    assert table.rows[0][0] == "steps to 80 %, none / sync"
    assert table.rows[0][3:] == ["at least 5", "holds"]
    assert table.rows[1][1] == "0.9 (0.8 to 0.9)"
