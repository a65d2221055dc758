import math

import pytest

from service.domain.advice import advise, decide, effective_values, needed_metrics
from trainer.jobspec import JobSpec

MLP = {"name": "mlp", "hidden": [8, 8]}
CNN = {"name": "cnn", "channels": [4]}


def make_spec(**changes):
    values = {"model": MLP, "data": {"name": "digits"}, "steps": 10, "num_workers": 4}
    return JobSpec.model_validate(values | {"global_batch_size": 8} | changes)


def expected_share(workers, values):
    return (workers - 1) / (workers * values - 1)


def expected_discrepancy(workers, values):
    return math.sqrt(2 / (math.pi * values) * (1 - 1 / workers))


def shares(**layers):
    """Return curves with a constant share per layer."""
    return {f"probe/{layer}/variance_share": [(0, share), (50, share)] for layer, share in layers.items()}


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("values", [2, 8, 16, 32])
def test_effective_values_invert_the_expectations(workers, values):
    share, discrepancy = expected_share(workers, values), expected_discrepancy(workers, values)
    assert effective_values(workers, share=share) == pytest.approx(values)
    assert effective_values(workers, discrepancy=discrepancy) == pytest.approx(values)
    assert effective_values(workers, share=share, discrepancy=9) == pytest.approx(values)


def test_workers_without_difference_have_many_values():
    assert effective_values(4, share=0.0) == effective_values(4, discrepancy=0.0) == 1e6


@pytest.mark.parametrize(
    ("values", "samples", "decision"),
    [
        (1, 16, "synchronise"),
        (7.9, 16, "synchronise"),
        (8, 16, "either"),
        (11.9, 16, "either"),
        (12, 12, "no need"),
        (1e6, 12, "no need"),
        # Values of positions do not replace samples.
        (1e6, 3, "synchronise"),
        (1e6, 4, "either"),
        (1e6, 11, "either"),
    ],
)
def test_thresholds(values, samples, decision):
    assert decide(values, samples) == decision


@pytest.mark.parametrize(
    ("workers", "batch", "decision", "group"),
    [
        (4, 8, "synchronise", 4),
        (2, 8, "synchronise", 2),
        (8, 32, "synchronise", 4),
        (8, 8 * 6, "synchronise", 2),
        (6, 12, "synchronise", 6),
        (4, 32, "either", 2),
        (4, 64, "no need", None),
        (2, 64, "no need", None),
        (1, 8, "no need", None),
    ],
)
@pytest.mark.parametrize("is_measured", [True, False])
def test_decision_and_group_by_workers_and_batch(workers, batch, decision, group, is_measured):
    spec = make_spec(num_workers=workers, global_batch_size=batch)
    share = expected_share(workers, batch / workers)
    found = advise(spec, shares(norm1=share, norm2=share / 10) if is_measured else {})
    assert (found.decision, found.sync_group_size, found.workers) == (decision, group, workers)
    if workers > 1:
        assert found.basis == ("measured" if is_measured else "predicted")
        assert ("predicted" in found.reason) is not is_measured
        assert found.reason.startswith("norm1 has ")


def test_the_layer_with_the_fewest_values_decides():
    spec = make_spec(global_batch_size=64)
    found = advise(spec, shares(a=expected_share(4, 100), b=expected_share(4, 2)))
    assert found.decision == "synchronise"
    assert [(layer.layer, layer.decision) for layer in found.layers] == [
        ("a", "no need"),
        ("b", "synchronise"),
    ]


def test_a_single_batch_does_not_decide():
    share = expected_share(4, 16)
    curve = [(0, share), (10, 0.9), (20, share), (30, math.nan), (40, math.inf)]
    found = advise(make_spec(global_batch_size=64), {"probe/norm1/variance_share": curve})
    assert found.decision == "no need"


def test_the_discrepancy_serves_without_a_share():
    curve = [(0, expected_discrepancy(4, 2))]
    found = advise(make_spec(), {"probe/layer1.0/discrepancy": curve})
    assert found.layers[0].layer == "layer1.0"
    assert found.layers[0].effective_values == pytest.approx(2)


def test_values_that_depend_on_each_other_are_reported():
    curves = shares(norm1=expected_share(4, 3)) | {"probe/norm1/values_per_channel": [(0, 128.0)]}
    found = advise(make_spec(model=CNN), curves)
    assert found.decision == "synchronise"
    assert "its 128 values depend on each other" in found.reason


@pytest.mark.parametrize(
    ("effective", "decision", "group"),
    [(10, "synchronise", 4), (29, "synchronise", 4), (65, "no need", None)],
)
def test_shards_that_differ_need_synchronisation_at_more_values(effective, decision, group):
    """With as many values from shards that are drawn alike there is no need."""
    curves = shares(norm1=expected_share(4, effective))
    found = advise(make_spec(global_batch_size=4 * 128), curves)
    assert (found.decision, found.sync_group_size) == (decision, group)
    assert "than its 128 samples per worker: the shards differ" in found.reason
    alike = advise(make_spec(global_batch_size=4 * 12), shares(norm1=expected_share(4, 13)))
    assert alike.decision == "no need"


@pytest.mark.parametrize(
    ("batch", "decision", "group", "text"),
    [
        (
            8,
            "synchronise",
            4,
            "30 effective values per channel and worker, but of 2 samples, fewer than 4",
        ),
        (
            16,
            "either",
            4,
            "but of 4 samples, fewer than 12, so it may help",
        ),
        (24, "either", 2, "but of 6 samples, fewer than 12, so it may help"),
        (48, "no need", None, "norm1 has 30 effective values per channel and worker, at least 12"),
    ],
)
def test_few_samples_count_as_much_as_few_values(batch, decision, group, text):
    found = advise(make_spec(model=CNN, global_batch_size=batch), shares(norm1=expected_share(4, 30)))
    assert (found.decision, found.sync_group_size) == (decision, group)
    assert text in found.reason


def test_few_samples_of_any_model_need_no_measurement():
    found = advise(make_spec(model=CNN), {})
    assert (found.decision, found.basis, found.sync_group_size) == ("synchronise", "predicted", 4)
    assert found.reason.startswith("2 samples per worker are fewer than 4; predicted")


def test_few_values_of_all_workers_are_reported():
    found = advise(make_spec(num_workers=2, global_batch_size=4), {})
    assert "all workers together have few samples" in found.reason
    assert "all workers together" not in advise(make_spec(), shares(norm1=expected_share(4, 1.9))).reason


@pytest.mark.parametrize(
    "changes", [{"model": CNN}, {"data_partition": "by_label"}, {"model": {"name": "timm:resnet26"}}]
)
def test_nothing_is_predicted_where_samples_or_values_are_dependent(changes):
    found = advise(make_spec(**({"global_batch_size": 64} | changes)), {})
    assert (found.decision, found.basis, found.sync_group_size) == ("cannot tell", "none", None)
    assert found.reason.startswith("nothing was measured; submit the job with probes.measure")


def test_other_norms_get_advice_on_batch_normalisation():
    assert "this is about batch normalisation" in advise(make_spec(norm="group"), {}).reason


@pytest.mark.parametrize(("norm", "slowdown"), [("batch", 0.3), ("sync", 0.3 / 0.7), ("none", 0.3)])
def test_cost_is_relative_to_a_step_without_it(norm, slowdown):
    curves = {"probe/step_seconds": [(2, 1.0), (4, 9.0), (6, 1.0)], "probe/sync_seconds": [(0, 0.3)]}
    cost = advise(make_spec(norm=norm), curves).cost
    assert (cost.step_seconds, cost.sync_seconds) == (1.0, 0.3)
    assert cost.slowdown == pytest.approx(slowdown)
    assert advise(make_spec(norm=norm), {}).cost is None
    del curves["probe/step_seconds"]
    assert advise(make_spec(norm=norm), curves).cost.slowdown is None


def test_only_needed_metrics_are_read():
    names = ["accuracy", "probe/a.b/variance_share", "probe/a/discrepancy", "probe/a/discrepancy_used"]
    assert needed_metrics([*names, "probe/sync_seconds"]) == [
        "probe/a.b/variance_share",
        "probe/a/discrepancy",
        "probe/sync_seconds",
    ]
