import pytest

from tests.trainer.factories import make_spec
from tests.trainer.probes.probing import differentiate, make_batch, make_model, measure, norm_of


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_gradient_norms_are_those_of_the_mean_loss(norm):
    spec = make_spec(norm=norm, probes={"measure": ["gradient_norm"]})
    values = measure(spec, make_batch())
    _, gradients = differentiate(make_model(spec), make_batch())
    assert values["probe/gradient_norm"] == pytest.approx(norm_of(gradients.values()))
    layer = [gradient for name, gradient in gradients.items() if name.startswith("linear2.")]
    assert values["probe/linear2/gradient_norm"] == pytest.approx(norm_of(layer))
