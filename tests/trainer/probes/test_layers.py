import numpy as np
import pytest

from tests.trainer.factories import make_spec
from tests.trainer.probes.probing import RELU, make_batch, make_model, measure


@pytest.mark.parametrize("norm", ["none", "sync"])
def test_percentiles_are_those_of_the_middle_unit_before_the_activation(norm):
    spec = make_spec(norm=norm, model=RELU, probes={"measure": ["percentiles"]})
    values = measure(spec, make_batch())
    model = make_model(spec)
    inputs = model[: list(dict(model.named_children())).index("activation2")](make_batch().inputs)
    expected = np.percentile(inputs[:, 6].detach(), [15, 50, 85])
    assert [values[f"probe/activation2/unit6/p{percent}"] for percent in (15, 50, 85)] == pytest.approx(
        expected
    )
    assert len(values) == 6


def test_a_unit_of_a_convolution_is_a_map_with_all_its_positions():
    spec = make_spec(
        model={"name": "cnn", "channels": [4, 6]}, norm="none", probes={"measure": ["percentiles"]}
    )
    values = measure(spec, make_batch(shape=(1, 8, 8)), shape=(1, 8, 8))
    maps = make_model(spec, (1, 8, 8)).conv1(make_batch(shape=(1, 8, 8)).inputs)[:, 2]
    assert values["probe/activation1/unit2/p85"] == pytest.approx(np.percentile(maps.detach(), 85))


def test_drift_is_relative_to_the_previous_statistics():
    spec = make_spec(norm="none", probes={"measure": ["drift"], "layers": ["linear2"]})
    first, second = make_batch(seed=1), make_batch(seed=2)
    assert measure(spec, first) == {}
    values = measure(spec, first, second)
    model = make_model(spec)
    layer = list(dict(model.named_children())).index("linear2")
    before, after = (model[: layer + 1](batch.inputs).detach() for batch in (first, second))
    variance, variance_after = before.var(0, correction=0), after.var(0, correction=0)
    assert values == {
        "probe/linear2/mean_drift": pytest.approx(
            float(((after.mean(0) - before.mean(0)).abs() / variance.sqrt()).mean())
        ),
        "probe/linear2/variance_drift": pytest.approx(
            float(((variance_after - variance).abs() / variance).mean())
        ),
    }
