import pytest

from tests.trainer.factories import make_spec
from tests.trainer.probes.probing import (
    RATE,
    RELU,
    differentiate,
    make_batch,
    make_model,
    measure,
    norm_of,
    step,
)


def test_the_landscape_is_the_loss_and_the_gradient_along_the_step():
    spec = make_spec(norm="batch", model=RELU, probes={"measure": ["landscape"]})
    values = measure(spec, make_batch())
    model = make_model(spec)
    _, gradients = differentiate(model, make_batch())
    there = [differentiate(step(model, gradients, RATE * size), make_batch()) for size in (0.5, 1, 2, 4)]
    losses = [loss for loss, _ in there]
    change = max(norm_of(other[name] - gradients[name] for name in gradients) for _, other in there)
    assert values == {
        "probe/loss_min": pytest.approx(min(losses)),
        "probe/loss_max": pytest.approx(max(losses)),
        "probe/loss_range": pytest.approx(max(losses) - min(losses)),
        "probe/gradient_change": pytest.approx(change),
        "probe/gradient_change_ratio": pytest.approx(change / norm_of(gradients.values())),
    }
