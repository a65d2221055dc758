import math

import pytest

from service.api.schemas import FindingView
from service.cli.report_tables import finding_cells
from service.domain.verdicts import Interval, Run, judge
from tests.service.domain.recipe_factory import FASTER, FINAL, make_recipe

WINDOW = {"along": "optimizer.lr", "at_least": 0.85, "size": "width"}


def run(norm, values, seed=0, every=100, metric="accuracy", **more):
    curve = [(number * every, value) for number, value in enumerate(values)]
    return Run(
        variant={"norm": norm} | more.pop("also", {}),
        seed=seed,
        curves={metric: curve} | more.pop("curves", {}),
        **more,
    )


def number(verdict, finding=0, value=0):
    return verdict.findings[finding].values[value].number


def on_three_seeds(norm, values, **more):
    return [run(norm, values, seed, **more) for seed in range(3)]


def test_a_step_ratio_is_judged_by_its_interval_over_seeds():
    recipe = make_recipe(FASTER)
    runs = [*on_three_seeds("none", [0.1] * 10 + [0.9]), *on_three_seeds("sync", [0.1, 0.1, 0.8])]
    assert judge(recipe, runs[:-1]).judgement == "not enough data"
    assert judge(recipe, runs).judgement == "holds"
    verdict = judge(recipe, [*runs[:-1], run("sync", [0.1, 0.1, 0.1, 0.8], 2)])
    assert verdict.judgement == "cannot tell"
    assert [value.number.low for value in verdict.findings[0].values] == [5.0, 5.0, 10 / 3]
    interval = verdict.findings[0].interval
    assert (interval.low, interval.high) == pytest.approx((2.44185, 7.81315), rel=1e-5)  # of the logarithms
    assert judge(recipe, [*runs[:3], *on_three_seeds("sync", [0.1, 0.1, 0.1, 0.8])]).judgement == "fails"


def test_one_seed_of_many_does_not_decide_a_rule():
    """A rule that had to hold for every seed failed more often with more seeds."""
    runs = [run("sync", [0.7 if seed == 5 else 0.9], seed) for seed in range(20)]
    assert judge(make_recipe(FINAL), runs).judgement == "holds"


@pytest.mark.parametrize(("seeds", "judged"), [(1, "cannot tell"), (2, "cannot tell"), (3, "holds")])
def test_fewer_than_three_seeds_are_inconclusive(seeds, judged):
    assert judge(make_recipe(FINAL), on_three_seeds("sync", [0.9])[:seeds]).judgement == judged


@pytest.mark.parametrize(
    ("differences", "shows_none"),
    [((0.1, 0.2, 0.15), False), ((-0.01, 0.004, -0.002), True), ((0.1, 0.1), False)],
)
def test_an_interval_that_contains_equal_sides_shows_no_difference(differences, shows_none):
    figure = {key: FASTER[key] for key in ("label", "of", "against")} | {
        "measure": {"take": "final"},
        "by": "difference",
    }
    runs = [
        run(norm, [0.5 + (difference if norm == "none" else 0)], seed)
        for seed, difference in enumerate(differences)
        for norm in ("none", "sync")
    ]
    [_, finding] = judge(make_recipe(FINAL, figures=[figure]), runs).findings
    assert finding.shows_no_difference == shows_none
    assert ("no significant difference (3 seeds)" in finding_cells(FindingView.of(finding))) == shows_none


def test_a_level_that_is_never_reached_bounds_the_ratio():
    never, soon, late = [0.1] * 11, [0.1, 0.8], [0.1, 0.1, 0.1, 0.8]
    recipe = make_recipe(FASTER)

    def judge_curves(none, sync):
        return judge(recipe, [*on_three_seeds("none", none), *on_three_seeds("sync", sync)])

    assert judge_curves(never, soon).judgement == "holds"
    assert (
        number(judge_curves(never, soon))
        == judge_curves(never, soon).findings[0].interval
        == Interval(10.0, math.inf)
    )
    assert judge_curves(never, late).judgement == "cannot tell"
    assert judge_curves(soon, never).judgement == "fails"
    assert judge_curves(never, never).judgement == "cannot tell"


def test_a_level_can_be_the_best_of_a_variant():
    rule = FASTER | {"measure": {"take": "steps_to", "level": {"norm": "none"}}}
    runs = [run("none", [0.1, 0.2, 0.4, 0.6, 0.7, 0.75]), run("sync", [0.1, 0.76])]
    assert number(judge(make_recipe(rule), runs)) == Interval(5.0, 5.0)


def test_a_loss_reaches_its_level_from_above():
    rule = FASTER | {"measure": {"metric": "test_loss", "take": "steps_to", "level": {"norm": "none"}}}
    runs = [
        run("none", [2.3, 2, 1.5, 1, 0.6, 0.5], metric="test_loss"),
        run("sync", [2.3, 0.5], metric="test_loss"),
    ]
    assert number(judge(make_recipe(rule), runs)) == Interval(5.0, 5.0)


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ({"take": "final"}, 0.5),
        ({"take": "max"}, 0.9),
        ({"take": "min"}, 0.1),
        ({"take": "mean"}, 0.5),
        ({"take": "range"}, 0.8),
        ({"take": "range", "from_step": 200}, 0.4),
        ({"take": "max", "minus": "train_accuracy"}, 0.7),
    ],
)
def test_summaries_of_a_curve(measure, value):
    figure = FINAL | {"measure": measure}
    one = run("sync", [0.1, 0.5, 0.9, 0.5], curves={"train_accuracy": [(200, 0.2), (300, 0.3)]})
    assert number(judge(make_recipe(figure), [one])).low == pytest.approx(value)


def test_a_window_excludes_diverged_and_poor_runs():
    runs = [
        run(norm, [0.1, value], seed, also={"optimizer.lr": rate}, diverged=norm == "none" and rate == 5)
        for seed in range(3)
        for norm, values in (("none", [0.2, 0.9, 0.9, 0.9]), ("sync", [0.9, 0.9, 0.9, 0.9]))
        for rate, value in zip([0.1, 1, 2, 5], values, strict=True)
    ]
    rule = FASTER | {
        "measure": {"take": "final", "window": WINDOW},
        "of": {"norm": "sync"},
        "against": {"norm": "none"},
    }
    verdict = judge(make_recipe(rule), runs)
    value = verdict.findings[0].values[0]
    assert (value.of.low, value.against.low, value.number.low, verdict.judgement) == (50, 2, 25, "holds")
    for size, expected in (("count", (4, 2)), ("lowest", (0.1, 1)), ("highest", (5, 2))):
        rule["measure"]["window"] = WINDOW | {"size": size}
        value = judge(make_recipe(rule), runs).findings[0].values[0]
        assert (value.of.low, value.against.low) == expected


def test_an_empty_window_is_a_subset_of_every_window():
    runs = [
        one
        for norm, value in (("none", 0.2), ("sync", 0.9))
        for one in on_three_seeds(norm, [0.1, value], also={"optimizer.lr": 1})
    ]
    for of, against, judged in (("sync", "none", "holds"), ("none", "sync", "fails")):
        for size, relation in (("lowest", "at_most"), ("highest", "at_least")):
            rule = FINAL | {
                "measure": {"take": "final", "window": WINDOW | {"size": size}},
                "of": {"norm": of},
                "against": {"norm": against},
                "by": "difference",
                "relation": relation,
                "bound": 0,
            }
            assert judge(make_recipe(rule), runs).judgement == judged


def test_a_run_that_diverged_has_no_final_value():
    assert judge(make_recipe(FINAL), on_three_seeds("sync", [0.1, 0.9])).judgement == "holds"
    assert (
        judge(make_recipe(FINAL), on_three_seeds("sync", [0.1, 0.9], diverged=True)).judgement
        == "cannot tell"
    )


def test_weights_are_compared_by_their_largest_difference():
    rule = FASTER | {"measure": None, "by": "weights", "relation": "at_most", "bound": 1e-9}
    for change, judged in ((1e-10, "holds"), (1e-8, "fails")):
        runs = [
            *on_three_seeds("none", [1], weights=[1.0, 2.0, 3.0]),
            *on_three_seeds("sync", [1], weights=[1.0, 2.0 + change, 3.0]),
        ]
        assert judge(make_recipe(rule), runs).judgement == judged
    assert judge(make_recipe(rule), [run("none", [1]), run("sync", [1])]).judgement == "not enough data"


def test_a_figure_is_reported_per_value_and_not_judged():
    figure = {key: FINAL[key] for key in ("label", "measure")} | {
        "of": {},
        "each": {"norm": ["none", "sync"]},
    }
    runs = [*on_three_seeds("none", [0.1]), *on_three_seeds("sync", [0.9])]
    verdict = judge(make_recipe(FINAL, figures=[figure]), runs)
    assert verdict.judgement == "holds"
    assert [(finding.case, finding.judgement) for finding in verdict.findings] == [
        ({}, "holds"), ({"norm": "none"}, None), ({"norm": "sync"}, None),
    ]  # fmt: skip


def test_without_runs_the_verdict_is_inconclusive():
    assert judge(make_recipe(FINAL), []).judgement == "not enough data"
