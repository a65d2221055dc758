import pytest

from service.domain.comparisons import (
    MAX_COMPARISON_JOBS,
    ComparisonSpec,
    choose_baseline,
    describe,
    expand,
    without_seed,
)
from trainer.jobspec import InvalidField, JobSpec, Norm

SPEC = JobSpec(steps=10, num_workers=2)


def test_one_spec_per_point_in_the_order_of_the_matrix():
    points = expand(SPEC, {"norm": ["none", "sync"], "optimizer.lr": [0.1, 0.5], "seed": [0, 1]})
    assert len(points) == 8
    assert [point["seed"] for point, _ in points] == [0, 1] * 4
    assert points[-1][0] == {"norm": "sync", "optimizer.lr": 0.5, "seed": 1}
    assert points[-1][1].norm is Norm.SYNC
    assert points[-1][1].optimizer.lr == 0.5
    assert points[-1][1].seed == 1
    assert points[0][1].steps == SPEC.steps


@pytest.mark.parametrize(
    ("matrix", "field", "message"),
    [
        ({"optimiser.lr": [0.1]}, "matrix.optimiser.lr", "optimizer.lr"),
        ({"optimizer": [0.1]}, "matrix.optimizer[0]", "valid dictionary"),
        ({"optimizer.lr": [0.1, -1]}, "matrix.optimizer.lr[1]", "greater than 0"),
        ({"norm": ["sync", "best"]}, "matrix.norm[1]", "'none', 'batch', 'sync'"),
        ({"global_batch_size": [1]}, "matrix.global_batch_size[0]", "must be between 2 and 4000"),
        ({"num_workers": [2, 100]}, "matrix", "global_batch_size"),
        ({"seed": [0, 0]}, "matrix", "seed=0 occurs twice"),
        ({"optimizer.lr": [1, 1.0]}, "matrix", "optimizer.lr=1 occurs twice"),
        (
            {"optimizer.lr": [0.1], "optimizer": [{"lr": 0.3}]},
            "matrix.optimizer.lr",
            "sets optimizer as a whole",
        ),
        ({"seed": [0] * 10_000_000}, "matrix", "at most 256"),
        ({"seed": list(range(MAX_COMPARISON_JOBS + 1))}, "matrix", "at most 256"),
        ({"model.hidden.0": [5]}, "matrix.model.hidden.0", "model.hidden"),
    ],
)
def test_invalid_values_are_named(matrix, field, message):
    with pytest.raises(InvalidField) as caught:
        expand(SPEC, matrix)
    assert caught.value.field == field
    assert message in caught.value.rule


BN_X5 = {"norm": "sync", "optimizer.lr": 0.05}


def test_named_variants_set_several_fields_together_and_the_matrix_multiplies_them():
    comparison = ComparisonSpec(
        spec=SPEC, variants={"baseline": {"norm": "none"}, "bn-x5": BN_X5}, matrix={"seed": [0, 1]}
    )
    points = expand(comparison.spec, comparison.matrix, comparison.variants)
    assert [point for point, _ in points] == [
        {"variant": name, "seed": seed} for name in ("baseline", "bn-x5") for seed in (0, 1)
    ]
    assert (points[3][1].norm, points[3][1].optimizer.lr, points[3][1].seed) == (Norm.SYNC, 0.05, 1)
    assert choose_baseline(comparison.axes, {"variant": "bn-x5"}) == {"variant": "bn-x5"}


@pytest.mark.parametrize(
    ("variants", "matrix", "field"),
    [
        ({"a": {"optimizer.lr": -1}}, {"seed": [0]}, "variants.a.optimizer.lr"),
        ({"a": {"lr": 1}}, {"seed": [0]}, "variants.a.lr"),
        ({"a": BN_X5, "b": BN_X5}, {"seed": [0]}, "matrix"),
        ({"a": BN_X5}, {"norm": ["none"]}, "variants.a.norm"),
        ({"a": BN_X5}, {"optimizer": [{"lr": 1}]}, "variants.a.optimizer.lr"),
        ({"a": {"optimizer": {"lr": 1}}}, {"optimizer.lr": [1]}, "matrix.optimizer.lr"),
        ({"a": BN_X5}, {"variant": ["a"]}, "matrix.variant"),
        ({}, {"variant": ["a"]}, "matrix.variant"),
    ],
)
def test_invalid_named_variants_are_named(variants, matrix, field):
    with pytest.raises(InvalidField) as caught:
        expand(SPEC, matrix, variants)
    assert caught.value.field == field


def test_the_baseline_is_completed_with_first_values():
    matrix = {"norm": ["none", "sync"], "optimizer.lr": [0.1, 0.5], "seed": [0, 1]}
    assert choose_baseline(matrix, None) == {"norm": "none", "optimizer.lr": 0.1}
    assert describe(choose_baseline({"optimizer.lr": [1, 2]}, {"optimizer.lr": 1.0})) == "optimizer.lr=1"
    assert choose_baseline(matrix, {"optimizer.lr": 0.5}) == {"norm": "none", "optimizer.lr": 0.5}


@pytest.mark.parametrize(
    ("wanted", "field"),
    [({"seed": 0}, "baseline.seed"), ({"norm": "group"}, "baseline.norm"), ({"x": 1}, "baseline.x")],
)
def test_a_baseline_outside_the_matrix_is_rejected(wanted, field):
    with pytest.raises(InvalidField) as caught:
        choose_baseline({"norm": ["none", "sync"], "seed": [0]}, wanted)
    assert caught.value.field == field


def test_variants_have_readable_names():
    assert (
        describe({"norm": "sync", "optimizer.lr": 0.1, "model.hidden": [3, 3]})
        == "norm=sync optimizer.lr=0.1 model.hidden=[3, 3]"
    )
    assert describe(without_seed({"seed": 3})) == "base"
